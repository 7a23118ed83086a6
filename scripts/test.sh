#!/usr/bin/env bash
# Runs all checks before a commit: lint, format, types, tables, tests. Creates .venv if needed.
#
#   scripts/test.sh [--quick] [PYTEST ARGUMENT...]
#
#   --quick   skip the tests marked slow, which compile, start processes or train; for daily use
#   --help    print this text
#
# All other arguments go to pytest: scripts/test.sh tests/ops -k linear
# MESA_TRAIN_TEST_WORKERS is the number of processes; default: the number of cores, at most 8.
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

# One command for each line, because bash does not stop at a failure inside an && list.
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
# As many processes as cores, each with one thread. Threads of two processes on one core would wait
# for each other far longer than they compute.
workers=${MESA_TRAIN_TEST_WORKERS:-$(python -c 'import os; print(min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()))')}
# Each file runs in one process, so a fixture that compiles, measures or starts workers runs once.
# tests/conftest.py sets the order of the files.
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} exec python -m pytest -n "$workers" --dist loadfile \
    --no-loadscope-reorder \
    ${selection[@]+"${selection[@]}"} ${given[@]+"${given[@]}"}
