#!/bin/sh
# Makes model.onnx again from the default model and compares it with the committed file.
#
#   ./regenerate.sh [OUTPUT]      default: model.new.onnx beside this script
#
# Needs python3 (3.11 or later) with venv, and a package index that pip can reach.
set -eu

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
. "$here/../regenerate-common.sh"

prepare onnxruntime==1.32.0
"$python" "$here/../convert_fp16.py" "$default" "$work/model"
finish "$work/model/model.onnx" "$@"
