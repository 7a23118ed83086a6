"""The C++ kernels compiled for other processors: the plain versions beside each instruction that not
every processor has give the same bits."""

import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import conftest
import pytest

# Flags in /proc/cpuinfo that a host needs to run what is compiled for a target.
TARGETS = {"x86-64": set(), "x86-64-v3": {"avx2", "fma", "f16c", "bmi2"}}


def host_flags():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line for line in lines if line.startswith("flags")), "").split())


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_for_another_target_equal_the_reference(tmp_path, target):
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(shlex.split(compiler)[0]) is None:
        pytest.skip("no C++ compiler")
    if platform.machine() not in ("x86_64", "AMD64") or not TARGETS[target] <= host_flags():
        pytest.skip(f"this processor does not run code for {target}")
    environment = {
        # Behind the flags of the build: the compiler takes the last -march.
        "MESA_TRAIN_CXXFLAGS": f"-march={target}",
        "MESA_TRAIN_CACHE": str(tmp_path),
        "MESA_TRAIN_CPU_KERNELS": "1",
        "OMP_NUM_THREADS": "1",
    }
    script = Path(__file__).with_name("cpu_target.py")
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=conftest.PATIENCE_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
