#!/usr/bin/env bash
# Checks and measures a GPU in under 8 minutes: the Triton kernels against the reference, each
# operator against a copy, and whole training steps of vit_base at batch 128. Creates .venv if needed.
#
#   bash scripts/bench/gpu.sh             rows go to docs/results
#   OUT=/somewhere bash scripts/bench/gpu.sh
#   PYTHON=python3 bash scripts/bench/gpu.sh    use an existing environment
#
# A speed counts only if the kernels are correct: the first step that fails ends the script.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
if [ -z "${PYTHON:-}" ]; then
  source scripts/setup_env.sh
  setup_env dev
  PYTHON=python
fi
out=${OUT:-docs/results}
mkdir -p "$out"

if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "bench_gpu: PyTorch sees no CUDA device here, so there is nothing to measure." >&2
  echo "bench_gpu: without one, the same kernels are tested by Triton's interpreter:" >&2
  echo "bench_gpu:   python -m pytest tests/kernels -k triton" >&2
  exit 1
fi

missing=$("$PYTHON" -c 'import importlib.util as u
print(*[m for m in "triton pytest hypothesis timm typer rich yaml".split() if u.find_spec(m) is None])')
if [ -n "$missing" ]; then
  echo "bench_gpu: $PYTHON has no $missing; install them, or run without PYTHON=... for a .venv" >&2
  exit 1
fi

step() {
  echo "== $1 (at ${SECONDS} s)"
  shift
  "$@"
}

step "device" "$PYTHON" -c 'import torch, triton; print(torch.cuda.get_device_name(), torch.__version__, triton.__version__)'
# Triton's compiler takes nearly all of this time, once for each dtype, alignment and number of bits.
side_by_side=$("$PYTHON" -c 'import importlib.util as u, os
print(f"-n {min(8, os.cpu_count())}" if u.find_spec("xdist") else "")')
# shellcheck disable=SC2086 # one option and its number, or nothing
step "kernels against the reference" timeout 240 \
  "$PYTHON" -m pytest tests/kernels -q -k triton $side_by_side \
  --deselect tests/kernels/test_triton_operators.py::test_compiled_kernels_round_as_specified_and_move_whole_vectors
step "operators against a copy" timeout 100 "$PYTHON" scripts/bench/ops.py --device cuda \
  --out "$out/ops.jsonl"
step "training steps" timeout 140 "$PYTHON" scripts/bench/step.py --device cuda \
  --models vit_base_patch16_224 --batch-size 128 --methods plain,mesa8,mesa8-fused,mesa4,checkpoint,approx-bp \
  --rounds 9 --out "$out/bench_step.jsonl"
echo "== done after ${SECONDS} s; rows in $out"
