#!/usr/bin/env bash
# Everything that must hold before a commit: lint, format, types, tables, tests. Makes .venv if needed.
#
#   scripts/test.sh [--quick] [PYTEST ARGUMENT...]
#
#   --quick   without the tests marked slow: what compiles, starts processes or trains; for daily use
#   --help    this text
#
# All else goes to pytest: scripts/test.sh tests/ops -k linear
# MESA_TRAIN_TEST_WORKERS is the number of processes; as many as cores, at most 8, if unset.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

selection=()
given=()
for argument in "$@"; do
    case $argument in
        --quick) selection=(-m "not slow") ;;
        --help | -h)
            sed -n '2,/^[^#]/{s/^# \{0,1\}//p;}' scripts/test.sh
            exit
            ;;
        *) given+=("$argument") ;;
    esac
done

source scripts/setup_env.sh
setup_env dev

# One command a line: bash does not stop at a failure inside an && list.
echo "== ruff"
ruff check .
ruff format --check .
echo "== mypy"
mypy
echo "== tables"
python scripts/bench/make_tables.py --check
echo "== documents"
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
NO_MKDOCS_2_WARNING=1 mkdocs build --strict --site-dir "$site"
rm -rf "$site"
echo "== pytest"
# As many processes as cores, each with one thread: threads of two processes on one core wait for
# each other far longer than they work.
workers=${MESA_TRAIN_TEST_WORKERS:-$(python -c 'import os; print(min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()))')}
# Whole files to a process: a fixture that compiles, measures or starts workers then runs once.
# In the order that tests/conftest.py gives them.
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} exec python -m pytest -n "$workers" --dist loadfile \
    --no-loadscope-reorder \
    ${selection[@]+"${selection[@]}"} ${given[@]+"${given[@]}"}
