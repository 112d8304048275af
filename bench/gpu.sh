#!/usr/bin/env bash
# Everything that only a GPU can tell, on a machine without network: bench/gpu.sh [--minutes N] OUT [WHEELS]
#   OUT      one folder of results: logs, bench.jsonl, plots, and summary.txt to which each step adds a line
#   WHEELS   a folder of wheels to install first (trl, liger-kernel, cut-cross-entropy ...: what the machine lacks). If
#            one is of flashpo, nothing is built.
#   N        ends after so many minutes: suites run their smallest shape, a step takes a quarter of the time at most, and
#            steps for which no time is left say so
# Needs python3 with torch, triton, pytest, pytest-xdist, pybind11 and scikit-build-core (or their wheels), nvcc and
# CMake; for the suites of whole models transformers and TRL.
#   FLASHPO_STEPS="build doctor rollout"   only these, in the order below; a later call finds what was built
#   FLASHPO_DRY_RUN=1                      on a machine without a GPU: lists every step, runs those that need none
# The steps come in the order of what they tell, so that a run cut short has told the most. Minutes that they may take
# on one H100 or H200 with 16 cores; those of build to grpo_step from runs of parts of them:
#   build 2, doctor 0.7, tests 6
#   decode_step 1        step with and without CUDA graph against its bandwidth floor; 1.7B, 0.6B, 4B
#   packing 1.5          training pass of a 1.7B model, 8 completions, prompt 2048, up to 512 tokens; DPO; worst case
#   linear_logprob 1.5   against TRL, Liger, CCE and the bare products
#   tree_attention 2     forward and backward against FlashAttention on equal work
#   rollout 5            against generate and continuous batching; batch 64 with prompts of 512 and 2048, batch 256
#   grpo_step 8          whole step of an unmodified script, 1.7B, 8 completions, prompt 2048, up to 512 tokens
#   images 8             the same of prompts with an image of 1024 and 4096 tokens, 0.6B with a small tower (an estimate)
#   distillation_step 8  the same of distillation, 1.7B into 0.6B, system prompts of 1024 tokens
#   reward_step 3        a training step of a 1.7B reward model, and scoring 16 completions by one (an estimate)
#   tree_recurrence 1    forward and backward against the reference in torch
#   decode_attention, sample 1   against a copy of as many bytes
#   linear_divergence 1, selective_log_softmax 0.5, policy_loss 0.5, gae 0.5, group_advantages 0.5, overhead 0.5
#   mismatch 0.5         log-probs of rollout and trainer, beside the trainer's own batching noise
#   rollout_long 2, growth 4, sanitizer 3
set -uo pipefail
cd "$(dirname "$0")/.."
LIMIT=600 QUICK=() DEADLINE=
if [ "${1:-}" = --minutes ]; then
  LIMIT=$((${2:?--minutes N} * 15)) QUICK=(--quick) DEADLINE=$((SECONDS + 60 * $2))
  shift 2
fi
OUT=$(mkdir -p "${1:?usage: bench/gpu.sh [--minutes N] OUT [WHEELS]}" && cd "$1" && pwd)
WHEELS=${2:-}
PYTHON=${PYTHON:-python3}
DRY=${FLASHPO_DRY_RUN:-}
failed=0
SUITES="decode_step packing linear_logprob tree_attention rollout grpo_step images distillation_step reward_step
  tree_recurrence decode_attention sample linear_divergence selective_log_softmax policy_loss gae group_advantages overhead
  mismatch rollout_long growth"

step() { # step NAME COMMAND...: its output into NAME.log, a line into the summary; a failure does not end the script
  local name=$1 start=$SECONDS status limit=()
  shift
  case " ${FLASHPO_STEPS:-$name} " in *" $name "*) ;; *) return 0 ;; esac
  if [ -n "$DEADLINE" ]; then
    local left=$((DEADLINE - SECONDS))
    if [ "$left" -lt 15 ]; then
      echo "$name: not run, no time is left" | tee -a "$OUT/summary.txt"
      return 0
    fi
    limit=(timeout -s INT -k 10 $((left < LIMIT ? left : LIMIT)))
  fi
  if "${limit[@]}" "$@" >"$OUT/$name.log" 2>&1; then status=ok; else status="FAILED ($?)" failed=1; fi
  echo "$name: $status, $((SECONDS - start)) s" | tee -a "$OUT/summary.txt"
  [ "$status" = ok ]
}

on_gpu() { # step, but in a dry run only its command into the summary
  if [ -z "$DRY" ]; then step "$@"; else echo "${1}: needs a GPU: ${*:2}" | tee -a "$OUT/summary.txt"; fi
}

[ -z "$WHEELS" ] || step wheels "$PYTHON" -m pip install --no-index --no-deps "$WHEELS"/*.whl
compgen -G "${WHEELS:-no folder}/flashpo-*.whl" >/dev/null ||
  step build "$PYTHON" -m pip install --no-build-isolation --no-deps --force-reinstall . || exit 1
step doctor "$PYTHON" -m flashpo doctor --check
# -v: a run cut short names what failed
step tests "$PYTHON" -m pytest -v -m gpu -n 8 tests/test_gpu*.py tests/test_fused_norms.py
for suite in $SUITES; do
  on_gpu "$suite" timeout -s INT 600 "$PYTHON" -m flashpo bench "$suite" --device cuda --peers "${QUICK[@]}" \
    --out "$OUT/bench.jsonl" --plot "$OUT/plots"
done
# The CUDA C++ kernels alone: Triton's are checked against fp64 above, and memcheck does not follow their compiler
# (an assertion that is meant to fail is an error to it, and it excludes the profiler that counts launches)
on_gpu sanitizer compute-sanitizer --error-exitcode 1 "$PYTHON" -m pytest -q -m gpu tests/test_gpu_rl.py \
  tests/test_gpu_rollout.py -k "not stop_the_gpu and not one_launch and not exact_probabilities"
[ -z "$DRY" ] || step cpu_bench "$PYTHON" -m flashpo bench overhead --device cpu --out "$OUT/bench.jsonl" --plot "$OUT/plots"
exit $failed
