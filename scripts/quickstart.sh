#!/usr/bin/env bash
# Trains a small ViT on real images with and without mesa_train, side by side, in a few minutes.
# The first call creates .venv. Options go to the training script: scripts/quickstart.sh --help
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_env.sh
setup_env quickstart
exec python recipes/quickstart/train.py "$@"
