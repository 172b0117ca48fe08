#!/usr/bin/env bash
# What a machine with a GPU can tell about the Triton and CUDA kernels: what it is, tests, compute-sanitizer, timings; logs go into $OUT, timings into
# benchmarks/results/<device>. A step that fails does not stop the next one; the exit status says whether all passed. Needs no network.
# PY: the Python to use. LONG=1: the whole matrix of tests and of timings (hours: every sample is compiled). Without it a step is cut off
# where the LIMIT of all of them, 600 seconds, is used up, and what came after it is named as missing.
set -uo pipefail
cd "$(dirname "$0")/.."
PY=${PY:-python3}
OUT=${OUT:-out/gpu}
export PY OUT PYTHONPATH="$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}" NGKERNELS_TEST_BACKENDS=triton
mkdir -p "$OUT"
failed=()
LIMIT=${LIMIT:-$([ -n "${LONG:-}" ] && echo 86400 || echo 600)}
# timeout knows programs, not functions of this shell
limited() {
    local left=$1
    shift
    if [ "$(type -t "$1")" = function ]; then
        export -f "$1"
        timeout "$left" bash -c '"$@"' - "$@"
    else
        timeout "$left" "$@"
    fi
}
step() {
    local name=$1
    shift
    echo "== $name"
    local left=$((LIMIT - SECONDS - ${KEEP:-0}))
    if [ "$left" -lt 5 ]; then
        failed+=("$name (no time left)")
        return
    fi
    limited "$left" "$@" >"$OUT/$name.txt" 2>&1 || failed+=("$name")
    tail -n "${LINES_SHOWN:-3}" "$OUT/$name.txt"
}
# Tests in several processes: most of their time is compilation, which they share through Triton's cache.
tests_of() {
    "$PY" -m pytest -q --collect-only -p no:cacheprovider "$@" | grep '::' >"$OUT/collected" || return 1
    xargs -d '\n' -P "$(($(nproc) / 2 + 1))" -n 4 "$PY" -m pytest -q -p no:cacheprovider <"$OUT/collected"
}

# Every other file of the quick suite, on the CPU; Triton and CUDA have the files above. Side by side, each in its own process.
suite() {
    export NGKERNELS_TEST_BACKENDS=reference,cpp OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
    if "$PY" -c 'import xdist' 2>/dev/null; then
        "$PY" -m pytest -q -p no:cacheprovider -n auto --dist loadfile --no-loadscope-reorder -m 'not slow and not big' --ignore-glob 'tests/*_device.py'
    else
        ls tests/test_*.py benchmarks/tests/test_*.py | grep -v _device.py | xargs -P "$(nproc)" -n 1 "$PY" -m pytest -q -p no:cacheprovider -m 'not slow and not big'
    fi
}

step device nvidia-smi
step environment "$PY" -m ngkernels.env
step device-tests tests_of -m 'not big' tests/test_triton_device.py
step cuda-device-tests tests_of tests/test_cuda_device.py
step models-and-plans tests_of tests/test_golden_device.py tests/test_plan_device.py
step node-map "$PY" -m pytest -q -p no:cacheprovider tests/test_node_map.py -k "not instruction_set and not gradcheck"
step demo "$PY" -m neural_graphs.cli demo --smoke --device cuda --bf16 --out "$OUT/demo"
step large "$PY" -m pytest -q -p no:cacheprovider -m big tests/test_triton_device.py
sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
for tool in memcheck racecheck; do
    step "sanitizer-$tool" "$sanitizer" --tool "$tool" --error-exitcode 9 "$PY" -m pytest -q -p no:cacheprovider tests/test_triton_device.py -k sanitizer
    step "cuda-sanitizer-$tool" "$sanitizer" --tool "$tool" --error-exitcode 9 "$PY" -m pytest -q -p no:cacheprovider tests/test_cuda_device.py -k sanitizer
done
if [ -n "${LONG:-}" ]; then
    for name in aggregate readout checkpoint attend sparse random_expressions determinism; do
        step "values-$name" tests_of -m 'not big' "tests/test_$name.py"
    done
fi
KEEP=200 step suite suite  # what is left but the time for timings
LINES_SHOWN=80 step timings "$PY" -m benchmarks.gpu $([ -n "${LONG:-}" ] || echo --quick)
# Nsight Compute, where it is and may count: how near the CUDA kernels come to what the device can do, over a million edges.
ncu=$(command -v ncu || echo /usr/local/cuda/bin/ncu)
if [ -x "$ncu" ]; then
    step ncu "$ncu" --section SpeedOfLight --section Occupancy --section WarpStateStats --kernel-name-base demangled --kernel-name 'regex:(Messages|Options|Attend)(Forward|Backward)' --launch-count 60 "$PY" -c "
import torch, ngkernels as ngk
from ngkernels import tune
for purpose, paired in tune.PURPOSES.items():
    for columns in (32, 64):
        with ngk.use_backend('cuda'), torch.autocast('cuda', torch.bfloat16):
            tune.step_of(columns, paired, torch.device('cuda'), purpose == 'attend')()"
else
    echo "== ncu is not there: no figures of Nsight Compute"
fi
if [ -n "${LONG:-}" ]; then
    step tune env NGKERNELS_TILES="$OUT/tiles.json" NGKERNELS_FASTER="$OUT/faster.json" "$PY" -m ngkernels.tune
fi
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}; see $OUT"
    exit 1
fi
