#!/bin/sh
# Makes model.onnx again from the default model and compares it with the committed file.
#
#   ./regenerate.sh [OUTPUT]      default: model.new.onnx beside this script
#
# Needs python3 (3.11 or later) with venv, and a package index that pip can reach.
set -eu

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
default=$here/../efficientnet-lite0
output=${1:-"$here/model.new.onnx"}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM

python3 -m venv "$work/venv"
python="$work/venv/bin/python"
"$python" -m pip install --quiet --disable-pip-version-check \
    numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0

export PYTHONDONTWRITEBYTECODE=1
"$python" "$here/../convert_fp16.py" "$default" "$work/model"

status=0
if [ -f "$here/model.onnx" ]; then
    "$python" "$default/compare.py" "$here/model.onnx" "$work/model/model.onnx" || status=$?
fi
cp "$work/model/model.onnx" "$output"
echo "wrote $output"
exit "$status"
