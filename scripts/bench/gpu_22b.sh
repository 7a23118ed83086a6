#!/usr/bin/env bash
# Trains ViT-22B on one card, at full size from random weights: every parameter in 80 GB, and adapters
# on 4-bit weights. Each method takes a few steps. Expected and measured memory, images/s and
# model-flops utilisation go to docs/results/vit22b_onecard/results.jsonl.
#
#   bash scripts/bench/gpu_22b.sh
#   PYTHON=python3 bash scripts/bench/gpu_22b.sh                  use an existing environment
#   MODEL=vit_22b_3b BATCH=32 bash scripts/bench/gpu_22b.sh       a card of 24 GB
#   MODEL=vit_22b_tiny SIZE=56 BATCH=4 bash scripts/bench/gpu_22b.sh   a rehearsal, on a CPU too
#
# If a method fails, the next one still runs; the last line names the methods that failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1
if [ -z "${PYTHON:-}" ]; then
  source scripts/setup_env.sh
  setup_env dev || exit 1
  PYTHON=python
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
out=${OUT:-docs/results/vit22b_onecard}
model=${MODEL:-vit_22b}
failed=""

run() { # method, images a step
  echo "== $1, $2 images a step (at ${SECONDS} s)"
  timeout "${LIMIT:-280}" "$PYTHON" recipes/vit22b/onecard.py "$1" --model "$model" \
    --image-size "${SIZE:-224}" --batch-size "$2" --steps "${STEPS:-5}" --images random \
    --out "$out" || failed="$failed $1"
}

run lion "${BATCH:-48}"
run factored "${BATCH:-48}"
if "$PYTHON" -c 'import bitsandbytes' 2>/dev/null; then
  run nf4 "${BATCH:-8}"
else
  echo "== nf4 needs bitsandbytes: pip install 'mesa_train[bitsandbytes]'"
  failed="$failed nf4"
fi
echo "== after ${SECONDS} s, rows in $out/results.jsonl${failed:+; without:$failed}"
[ -z "$failed" ]
