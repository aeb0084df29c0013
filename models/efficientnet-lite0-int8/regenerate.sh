#!/bin/sh
# Makes model.onnx again from the default model and compares it with the committed file.
#
#   ./regenerate.sh [OUTPUT]      default: model.new.onnx beside this script
#
# Needs python3 (3.11 or later) with venv, a package index that pip can reach, and samples/. On
# another kind of processor the last digits of the measured ranges may differ.
set -eu

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
. "$here/../regenerate-common.sh"

prepare onnxruntime==1.32.0 pillow==13.0.0

# One thread: sums are added up in the same order every time.
OPENBLAS_NUM_THREADS=1 "$python" "$here/quantise.py" "$default/model.onnx" "$work/model.onnx"

finish "$work/model.onnx" "$@"
