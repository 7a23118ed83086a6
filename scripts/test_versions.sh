#!/usr/bin/env bash
# Runs the quick tests with another Python and another PyTorch, in an environment of their own.
#
#   scripts/test_versions.sh PYTHON TORCH [PYTEST ARGUMENT...]
#
#   PYTHON    the interpreter
#   TORCH     the version of PyTorch; pip chooses a torchvision for it
#
# The ends of docs/getting-started.md:
#
#   scripts/test_versions.sh python3.10 2.11.0
#   scripts/test_versions.sh python3.13 2.14.1
#
# Tests of packages that the environment lacks (transformers, DeepSpeed, ...) are skipped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ $# -lt 2 ]; then
    sed -n '2,/^[^#]/{s/^# \{0,1\}//p;}' scripts/test_versions.sh >&2
    exit 2
fi
python=$1 torch=$2
shift 2
place=.venv-$(basename "$python")-torch$torch
if [ ! -e "$place/.installed" ]; then
    "$python" -m venv "$place"
    "$place/bin/python" -m pip install --disable-pip-version-check --quiet \
        --editable ".[recipes,plan,dense,evaluation,quickstart]" "torch==$torch" \
        "pytest>=8.3" "pytest-xdist>=3.6" "hypothesis>=6.100" "expecttest>=0.3"
    touch "$place/.installed"
fi
"$place/bin/python" -c 'import sys, torch; print("Python", sys.version.split()[0], "PyTorch", torch.__version__)'
# Pages and benchmarks are the same in every version.
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} exec "$place/bin/python" -m pytest -m "not slow" \
    --ignore tests/docs --ignore tests/bench "$@"
