#!/usr/bin/env bash
# One window on a GPU machine, part by part. A part ends within $LIMIT seconds, says what it left undone, and prints a
# short table last; its files (at most eight) lie in $OUT.
#
#   benchmarks/gpu.sh build                 where nvcc is; needs no GPU and no CUDA torch: wheels into build/gpu/wheels
#   benchmarks/gpu.sh test [WORD...]        doctor, then the tests marked cuda; words go to pytest, as in `test -k bank`
#   benchmarks/gpu.sh bench OPERATION...    benchmarks, each into $OUT/OPERATION.json; OPERATION:GROUP runs one group
#   benchmarks/gpu.sh profile OPERATION     Nsight Compute: DRAM throughput, occupancy, registers, spills by kernel
#   benchmarks/gpu.sh sanitize              compute-sanitizer memcheck and racecheck on the small cases
#
# PYTHON: the interpreter with torch. CUDA_ARCHS: what `build` compiles for, as in "80 90 100". PYTHONS: as `make wheel`.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -n "${PYTHON:-}" ] || { [ -x .venv/bin/python ] && PYTHON=$PWD/.venv/bin/python || PYTHON=python3; }
OUT=${OUT:-build/gpu/out}
LIMIT=${LIMIT:-540}
CUDA_ARCHS=${CUDA_ARCHS:-90}
WHEELS=build/gpu/wheels
PEERS="array-api-compat liger-kernel cut-cross-entropy" # the first is needed, the others are compared with

stop() {
  echo "gpu.sh: $*" >&2
  exit 1
}

# Seconds that this call still has.
left() { echo $((LIMIT - SECONDS)); }

# ---- build ----

# An object file for each CUDA source, unless it is newer than every source; all at once, limited by the cores.
compile() {
  local headers=$1 objects=build/gpu/objects codes="" arch file
  for arch in $CUDA_ARCHS; do codes+=" -gencode arch=compute_$arch,code=sm_$arch"; done
  mkdir -p $objects
  for file in csrc/*/cuda.cu; do
    local object=$objects/${file#csrc/}
    object=${object%/cuda.cu}.o
    if [ ! -e "$object" ] || [ -n "$(find csrc -newer "$object" -name '*.[ch]*' -print -quit)" ]; then
      echo "$file $object"
    fi
  done | xargs -r -P "$(nproc)" -L 1 sh -c "echo nvcc \$1; exec nvcc -c \$1 -o \$2 $codes -O3 -lineinfo -std=c++17 \
    --expt-relaxed-constexpr -DUSE_CUDA -DTORCH_TARGET_VERSION=0x020a000000000000 -I$headers -Xcompiler -fPIC" nvcc
}

# A CPU-only torch has no libtorch_cuda to link with. A stub of that name stands in: at run time the loader finds the
# real one, which torch has loaded by then. What it offers is what the library takes of it, all from the stable shim.
STUB="aoti_torch_get_current_cuda_stream torch_c10_cuda_check_msg torch_c10_cuda_free_error_msg"

link() {
  local torch=$1 library=$2 name
  mkdir -p build/gpu/stub
  for name in $STUB; do echo "void $name(void) {}"; done |
    ${CC:-cc} -x c - -shared -fPIC -Wl,-soname,libtorch_cuda.so -o build/gpu/stub/libtorch_cuda.so
  nvcc -shared -cudart shared -o "$library" build/gpu/objects/*.o -Lbuild/gpu/stub -ltorch_cuda -L"$torch/lib" \
    -ltorch_cpu -Xlinker --no-undefined -Xlinker --no-allow-shlib-undefined -Xlinker -s
}

build() {
  local torch major library
  command -v nvcc >/dev/null || stop "build: nvcc is not on the PATH"
  torch=$($PYTHON -c "import torch; print(torch.__path__[0])")
  major=$(nvcc --version | sed -n 's/.*release \([0-9]*\).*/\1/p')
  library=_C_cu$major.so
  compile "$torch/include"
  mkdir -p $WHEELS
  link "$torch" "build/gpu/$library"
  rm -rf build/gpu/made $WHEELS/sdfast-*.whl
  SDFAST_CUDA=0 SDFAST_PYTHONS="${PYTHONS:-}" $PYTHON -m pip wheel --quiet --no-build-isolation --no-deps \
    --wheel-dir build/gpu/made .
  (
    cd build/gpu/made
    $PYTHON -m wheel unpack ./*.whl >/dev/null
    cp "../$library" sdfast-*/sdfast/
    $PYTHON -m wheel pack sdfast-*/ --dest-dir ../wheels >/dev/null
  )
  git describe --always --dirty >$WHEELS/commit 2>/dev/null || true
  for peer in $PEERS; do
    ls $WHEELS/"${peer//-/_}"-*.whl >/dev/null 2>&1 || $PYTHON -m pip download --quiet --no-deps --dest $WHEELS "$peer" ||
      echo "gpu.sh: $peer could not be had" >&2
  done
  ls -s --block-size=KiB $WHEELS
}

# ---- on the GPU ----

need_gpu() {
  $PYTHON -c "import torch" 2>/dev/null || stop "$part: $PYTHON has no torch"
  $PYTHON -c "import sys, torch; sys.exit(not torch.cuda.is_available())" ||
    stop "$part: no NVIDIA GPU here: torch $($PYTHON -c 'import torch; print(torch.__version__)') sees none"
}

# The wheels into a folder of their own in front of everything, so that the machine's Python stays as it was; then the
# libraries beside the sources, which the tests and benchmarks import. Without wheels, what can be built here.
install() {
  local site=$PWD/build/gpu/site
  if ls $WHEELS/sdfast-*.whl >/dev/null 2>&1 &&
    $PYTHON -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$site" $WHEELS/*.whl; then
    cp "$site"/sdfast/*.so sdfast/
    SDFAST_COMMIT=$(cat $WHEELS/commit 2>/dev/null || true)
    export SDFAST_COMMIT
  else
    echo "gpu.sh: building here" >&2
    SDFAST_CUDA_ARCHS=${SDFAST_CUDA_ARCHS:-$($PYTHON -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')} \
      $PYTHON -m pip install --quiet --no-build-isolation --no-deps --no-index --upgrade --target "$site" .
    cp "$site"/sdfast/*.so sdfast/
  fi
  rm -rf "$site/sdfast" # one sdfast: that of the sources, with these libraries
  export PYTHONPATH=$PWD:$site PYTHONUNBUFFERED=1
}

examine() {
  $PYTHON -m sdfast doctor >"$OUT/doctor.txt" || { cat "$OUT/doctor.txt" && stop "doctor found something broken"; }
  $PYTHON -c "
import sys
from sdfast import _native
sys.exit(_native.CUDA.reason)" || stop "$part: the CUDA library did not load"
}

run_tests() {
  local status=0
  examine
  timeout --signal=INT "$(left)" $PYTHON -m pytest -q -m cuda --no-header -p no:cacheprovider --maxfail=60 --durations=8 \
    $($PYTHON -c "import xdist" 2>/dev/null && echo "-n 6") "$@" >"$OUT/test.txt" 2>&1 || status=$?
  grep -E "^(FAILED|ERROR)" "$OUT/test.txt" | cut -c1-300 | head -n 60 || true
  tail -n 1 "$OUT/test.txt"
  [ $status -eq 124 ] && echo "gpu.sh: the limit of $LIMIT s came first: name some tests with -k" >&2
  return $status
}

bench() {
  local word operation group undone=""
  [ $# -gt 0 ] || stop "bench: wanted the names of operations"
  for word in "$@"; do
    operation=${word%%:*} group=${word#"$operation"}
    if [ "$(left)" -lt 60 ]; then
      undone+=" $word"
      continue
    fi
    timeout --signal=INT "$(left)" $PYTHON -m benchmarks "$operation" --output "$OUT/${word//[^A-Za-z0-9_.]/-}.json" \
      ${group:+--group "${group#:}"} >"$OUT/log" 2>&1 || undone+=" $word"
    cat "$OUT/log" >>"$OUT/bench.txt"
    grep -E "^\|.*(sdfast|target)|^[a-z_]+:|Error|error" "$OUT/log" | cut -c1-200 || true
  done
  rm -f "$OUT/log"
  [ -z "$undone" ] || stop "bench: left undone:$undone"
}

# The first group's first turn of each row is enough to see each kernel.
profile() {
  local metrics="gpu__time_duration.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed"
  metrics+=",sm__warps_active.avg.pct_of_peak_sustained_active,launch__registers_per_thread,launch__grid_size"
  metrics+=",launch__block_size,launch__shared_mem_per_block_dynamic,smsp__inst_executed_op_local_st.sum"
  metrics+=",smsp__inst_executed_op_local_ld.sum"
  command -v ncu >/dev/null || stop "profile: ncu is not on the PATH"
  timeout --signal=INT "$(left)" ncu --csv --page raw --metrics "$metrics" --kernel-name-base demangled \
    --kernel-name "regex:^(?!.*(at::native|cub::|gemm|cutlass)).*$" --launch-count 200 --log-file "$OUT/profile-$1.csv" \
    $PYTHON -m benchmarks.one_step "$@" || stop "profile: ncu ended with $?"
  $PYTHON -m benchmarks.one_step --table "$OUT/profile-$1.csv"
}

sanitize() {
  command -v compute-sanitizer >/dev/null || stop "sanitize: compute-sanitizer is not on the PATH"
  for tool in memcheck racecheck; do
    timeout --signal=INT "$(($(left) / 2 + 30))" compute-sanitizer --tool $tool --error-exitcode 1 --print-limit 5 \
      $PYTHON -m benchmarks.one_step sanitizer >"$OUT/$tool.txt" 2>&1 || stop "$tool: $(tail -n 3 "$OUT/$tool.txt")"
    echo "$tool: $(grep "ERROR SUMMARY\|RACECHECK SUMMARY" "$OUT/$tool.txt")"
  done
}

part=${1:-}
[ $# -gt 0 ] && shift
mkdir -p "$OUT"
case $part in
  build) build ;;
  test | bench | profile | sanitize)
    [ "$part" != profile ] || [ $# -gt 0 ] || stop "profile: wanted the name of an operation"
    need_gpu
    install
    case $part in
      test) run_tests "$@" ;;
      *) "$part" "$@" ;;
    esac
    ;;
  *) stop "got '${part}', wanted build, test, bench, profile or sanitize" ;;
esac
