#!/usr/bin/env bash
# Everything that only a GPU can tell, on a machine without network: bench/gpu.sh OUT [WHEELS]
#   OUT      one folder of results: logs, bench.jsonl, plots, and summary.txt with a line for each step
#   WHEELS   a folder of wheels to install first (trl, liger-kernel, cut-cross-entropy ...: what the machine lacks)
# Needs python3 with torch, triton, pytest, pybind11 and scikit-build-core (or their wheels), nvcc and CMake.
# FLASHPO_DRY_RUN=1 walks through the steps on a machine without a GPU: CPU benchmark, no sanitizer.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=$(mkdir -p "${1:?usage: bench/gpu.sh OUT [WHEELS]}" && cd "$1" && pwd)
WHEELS=${2:-}
PYTHON=${PYTHON:-python3}
DRY=${FLASHPO_DRY_RUN:-}
failed=0

step() { # step NAME COMMAND...: its output into NAME.log, a line into the summary; a failure does not end the script
  local name=$1 start=$SECONDS status
  shift
  if "$@" >"$OUT/$name.log" 2>&1; then status=ok; else status="FAILED ($?)" failed=1; fi
  echo "$name: $status, $((SECONDS - start)) s" | tee -a "$OUT/summary.txt"
  [ "$status" = ok ]
}

: >"$OUT/summary.txt"
[ -z "$WHEELS" ] || step wheels "$PYTHON" -m pip install --no-index --no-deps "$WHEELS"/*.whl
step build "$PYTHON" -m pip install --no-build-isolation --no-deps --force-reinstall . || exit 1
step doctor "$PYTHON" -m flashpo doctor --check
step tests "$PYTHON" -m pytest -q -m gpu tests
if [ -z "$DRY" ]; then
  # The CUDA C++ kernels alone: Triton's are checked against fp64 above, and memcheck does not follow their compiler
  # (an assertion that is meant to fail is an error to it, and it excludes the profiler that counts launches)
  step sanitizer compute-sanitizer --error-exitcode 1 "$PYTHON" -m pytest -q -m gpu tests/test_gpu_rl.py \
    tests/test_gpu_rollout.py -k "not stop_the_gpu and not one_launch and not exact_probabilities"
  step bench "$PYTHON" -m flashpo bench --device cuda --peers --out "$OUT/bench.jsonl" --plot "$OUT/plots"
else
  step bench "$PYTHON" -m flashpo bench overhead --device cpu --out "$OUT/bench.jsonl" --plot "$OUT/plots"
fi
exit $failed
