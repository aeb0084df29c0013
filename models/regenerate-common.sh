# What the models' regenerate.sh share; each sources it with `here`, its own folder, set.

default=$here/../efficientnet-lite0

# A folder for the work, $work, and a Python, $python, with what all need and the packages named.
prepare() {
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    trap 'exit 1' HUP INT TERM
    python3 -m venv "$work/venv"
    python="$work/venv/bin/python"
    "$python" -m pip install --quiet --disable-pip-version-check numpy==2.4.6 onnx==1.23.2 "$@"
    export PYTHONDONTWRITEBYTECODE=1
}

# Ends the script: compares the network MADE with the committed file and writes it to OUTPUT.
finish() { # MADE [OUTPUT]
    status=0
    if [ -f "$here/model.onnx" ]; then
        "$python" "$default/compare.py" "$here/model.onnx" "$1" || status=$?
    fi
    output=${2:-"$here/model.new.onnx"}
    cp "$1" "$output"
    echo "wrote $output"
    exit "$status"
}
