#!/usr/bin/env bash
# What a machine with a GPU can tell about the Triton and CUDA kernels: what it is, tests, compute-sanitizer, timings. Logs go into out/gpu,
# timings into benchmarks/results/<device>; with OUT, all of it goes there too, as one archive, after every step. A step that fails does not
# stop the next one; the exit status says whether all passed. Needs no network.
# PY: the Python to use. LONG=1: the whole matrix of tests and of timings (hours: every sample is compiled). Without it steps are cut off after
# their CAP, and where the LIMIT of all of them is used up: 570 seconds from BEGAN on (seconds since 1970; make sets it, so that the build
# counts). What came after that is named as missing: STEPS="name name" runs those alone.
set -uo pipefail
cd "$(dirname "$0")/.."
PY=${PY:-python3}
LOGS=out/gpu
BEGAN=${BEGAN:-$(date +%s)}
LIMIT=${LIMIT:-$([ -n "${LONG:-}" ] && echo 86400 || echo 570)}
QUICK=$([ -n "${LONG:-}" ] || echo ' and not slow')
export CUBLAS_WORKSPACE_CONFIG=:4096:8 # some tests ask PyTorch for deterministic algorithms
export PY LOGS PYTHONPATH="$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}" NGKERNELS_TEST_BACKENDS=triton
mkdir -p "$LOGS"
failed=()
# timeout knows programs, not functions of this shell
limited() {
    local left=$1
    shift
    if [ "$(type -t "$1")" = function ]; then
        export -f "$1"
        timeout -k 10 "$left" bash -c '"$@"' - "$@"
    else
        timeout -k 10 "$left" "$@"
    fi
}
pack() {
    [ -z "${OUT:-}" ] || { mkdir -p "$OUT" && tar czf "$OUT/gpu.tar.gz" "$LOGS" $(find benchmarks/results -type f -newermt "@$BEGAN"); }
}
step() {
    local name=$1
    shift
    [ -z "${STEPS:-}" ] || [[ " $STEPS " == *" $name "* ]] || return 0
    local now=$(($(date +%s) - BEGAN))
    echo "== $name, after $now s"
    local left=$((LIMIT - now))
    [ -n "${LONG:-}" ] || [ "$left" -le "${CAP:-600}" ] || left=$CAP
    if [ "$left" -lt 5 ]; then
        failed+=("$name (no time left)")
        return
    fi
    limited "$left" "$@" >"$LOGS/$name.txt" 2>&1 || failed+=("$name")
    tail -n "${LINES_SHOWN:-3}" "$LOGS/$name.txt"
    pack
}
# Tests in several processes: most of their time is compilation, which they share through Triton's cache.
tests_of() {
    local collected="$LOGS/collected.$$"
    "$PY" -m pytest -q --collect-only -p no:cacheprovider "$@" | grep '::' >"$collected" || return 1
    xargs -d '\n' -P "$(($(nproc) / 2 + 1))" -n 4 "$PY" -m pytest -q -p no:cacheprovider <"$collected"
}

# The files of tests that run for each declared backend. Tensors that they leave on the CPU travel to the GPU (tests/conftest.py).
backend_files() { grep -l '[(, ]backend: str' tests/test_*.py | grep -v '_device\|test_cuda_\|test_mutants'; }

# Every other file of the quick suite, as on a machine without a GPU; Triton and CUDA have the files above, and are built. Side by side, each in
# its own process.
suite() {
    export NGKERNELS_TEST_BACKENDS=reference,cpp OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE CUDA_VISIBLE_DEVICES= NGKERNELS_AOT_PYTHON="$PY"
    if "$PY" -c 'import xdist' 2>/dev/null; then
        "$PY" -m pytest -q -p no:cacheprovider -n auto --dist loadfile --no-loadscope-reorder -m 'not slow and not big' --ignore-glob 'tests/*_device.py' --ignore tests/test_cuda_build.py
    else
        ls tests/test_*.py benchmarks/tests/test_*.py | grep -v '_device.py\|test_cuda_build' | xargs -P "$(nproc)" -n 1 "$PY" -m pytest -q -p no:cacheprovider -m 'not slow and not big'
    fi
}

sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
# Without PyTorch's cache, an allocation is one, and what lies outside of it is noticed.
sanitized() {
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$1" --report-api-errors no --error-exitcode 9 "$PY" -m pytest -q -p no:cacheprovider "$2" -k sanitizer
}
export sanitizer

step device nvidia-smi
step environment "$PY" -m ngkernels.env
CAP=120 step cuda-device-tests tests_of -m "not big$QUICK" tests/test_cuda_device.py
CAP=60 step models-and-plans tests_of -m "not big$QUICK" tests/test_golden_device.py tests/test_plan_device.py
CAP=180 LINES_SHOWN=80 step timings "$PY" -m benchmarks.gpu $([ -n "${LONG:-}" ] || echo --quick)
for tool in memcheck racecheck; do
    CAP=60 step "cuda-sanitizer-$tool" sanitized "$tool" tests/test_cuda_device.py
done
CAP=150 step device-tests tests_of -m "not big$QUICK" tests/test_triton_device.py
CAP=60 step large "$PY" -m pytest -q -p no:cacheprovider -m big tests/test_triton_device.py
for tool in memcheck racecheck; do
    CAP=60 step "sanitizer-$tool" sanitized "$tool" tests/test_triton_device.py
done
CAP=60 step node-map "$PY" -m pytest -q -p no:cacheprovider tests/test_node_map.py -k "not instruction_set and not gradcheck"
CAP=90 step demo "$PY" -m neural_graphs.cli demo --smoke --device cuda --bf16 --out "$LOGS/demo"
# Nsight Compute, where it is and may count: how near the CUDA kernels come to what the device can do, over a million edges.
ncu=$(command -v ncu || echo /usr/local/cuda/bin/ncu)
if [ -x "$ncu" ]; then
    CAP=60 step ncu "$ncu" --clock-control none --section SpeedOfLight --section Occupancy --section WarpStateStats --kernel-name-base demangled --kernel-name 'regex:(Messages|Options|Attend)(Forward|Backward)' --launch-count 60 "$PY" -c "
import torch, ngkernels as ngk
from ngkernels import tune
for purpose, paired in tune.PURPOSES.items():
    for columns in (32, 64):
        with ngk.use_backend('cuda'), torch.autocast('cuda', torch.bfloat16):
            tune.step_of(columns, paired, torch.device('cuda'), purpose == 'attend')()"
else
    echo "== ncu is not there: no figures of Nsight Compute"
fi
# The suite on the device: what the CUDA kernels run of it; with Triton's every sample is compiled (LONG).
NGKERNELS_TEST_BACKENDS=cuda CAP=150 step suite-cuda tests_of -m "not big$QUICK" -k cuda $(backend_files)
if [ -n "${LONG:-}" ]; then
    for file in $(backend_files); do
        step "suite-triton-$(basename "$file" .py)" tests_of -m 'not big' -k triton "$file"
    done
    step tune env NGKERNELS_TILES="$LOGS/tiles.json" NGKERNELS_FASTER="$LOGS/faster.json" "$PY" -m ngkernels.tune
fi
step suite-cpu suite
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}; see $LOGS"
    exit 1
fi
