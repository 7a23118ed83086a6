#!/usr/bin/env bash
# Checks and measures a GPU in under 8 minutes. It needs PyTorch and timm, and no installation, no
# network and no git: a plain copy of the repository is enough.
#
#   bash scripts/bench/gpu.sh                     rows go to docs/results/gpu_first_run.jsonl
#   OUT=/somewhere bash scripts/bench/gpu.sh
#   PYTHON=.venv/bin/python bash scripts/bench/gpu.sh
#   bash scripts/bench/gpu.sh --sections "step plain,step mesa8"
#
# A section that fails is a row with its error, and the run goes on. Then
# `python scripts/bench/make_tables.py` writes the rows into the documents, beside the prediction.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${PYTHON:-python3}
out=${OUT:-docs/results}
budget=${BUDGET:-460}

for package in torch timm; do
  if ! "$python" -c "import $package" 2>/dev/null; then
    echo "gpu.sh: $python has no $package; choose another one: PYTHON=... bash scripts/bench/gpu.sh" >&2
    exit 1
  fi
done
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu.sh: PyTorch sees no CUDA device here, so there is nothing to measure. A dry run:" >&2
  echo "gpu.sh:   $python scripts/bench/gpu_first_run.py --device cpu --out runs/gpu" >&2
  exit 1
fi
exec timeout --signal=KILL "$((budget + 15))" "$python" scripts/bench/gpu_first_run.py \
  --device cuda --out "$out" --budget "$budget" "$@"
