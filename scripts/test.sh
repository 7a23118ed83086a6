#!/usr/bin/env bash
# Everything that must hold before a commit: lint, format, types, tests. Makes .venv if needed.
# Arguments go to pytest: scripts/test.sh -m "not slow"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_env.sh
setup_env dev

# One command a line: bash does not stop at a failure inside an && list.
echo "== ruff"
ruff check .
ruff format --check .
echo "== mypy"
mypy
echo "== tables"
python scripts/make_tables.py --check
echo "== pytest"
# As many processes as cores, each with one thread: threads of two processes on one core wait for
# each other far longer than they work.
workers=${MESA_TRAIN_TEST_WORKERS:-$(python -c 'import os; print(min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()))')}
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} exec python -m pytest -n "$workers" "$@"
