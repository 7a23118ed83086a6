"""The code that Triton makes for GPUs of seven generations. No GPU is needed."""

import subprocess
import sys
from pathlib import Path

import pytest
from limits import HUNG_S

NO_TARGET = 77  # as in triton_compiled.py

# T4 and 2080 Ti; A100; A10 and 3090; L4 and 4090; H100; B200; 5090. 90 has more combinations.
GPUS = (75, 80, 86, 89, 90, 100, 120)


@pytest.mark.slow
@pytest.mark.parametrize("capability", GPUS)
def test_compiled_kernels_fit_and_move_whole_vectors(capability):
    pytest.importorskip("triton.backends.nvidia", reason="Triton without its NVIDIA compiler")
    script = Path(__file__).with_name("triton_compiled.py")
    options = ["--all"] if capability == 90 else []
    done = subprocess.run(
        [sys.executable, str(script), str(capability), *options],
        capture_output=True,
        text=True,
        timeout=HUNG_S,
    )
    if done.returncode == NO_TARGET:
        pytest.skip(done.stdout.splitlines()[-1])
    assert done.returncode == 0, done.stdout + done.stderr
