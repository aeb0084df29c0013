#!/bin/sh
# Makes model.onnx again from the default model and compares it with the committed file.
#
#   ./regenerate.sh [OUTPUT]      default: model.new.onnx beside this script
#
# Needs python3 (3.11 or later) with venv, a package index that pip can reach, and samples/. On
# another kind of processor the last digits of the measured ranges may differ.
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
    numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0 pillow==13.0.0

export PYTHONDONTWRITEBYTECODE=1
# One thread: sums are added up in the same order every time.
OPENBLAS_NUM_THREADS=1 "$python" "$here/quantise.py" "$default/model.onnx" "$work/model.onnx"

status=0
if [ -f "$here/model.onnx" ]; then
    "$python" "$default/compare.py" "$here/model.onnx" "$work/model.onnx" || status=$?
fi
cp "$work/model.onnx" "$output"
echo "wrote $output"
exit "$status"
