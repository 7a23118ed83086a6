"""The sdist and the wheel: complete, and they run in a folder without the sources, with and without a compiler."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from limits import HUNG_S

ROOT = Path(__file__).resolve().parents[1]
BUILD = (
    "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
)
# What a user does first. It prints where the package is, and whether C++ code runs.
USE = """
import logging, pathlib, sys
logging.basicConfig(stream=sys.stdout, format="%(levelname)s")
import torch, mesa_train
from torch import nn
model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
x = torch.randn(512, 64)
plain = model(x)
mesa_train.wrap(model)
output = model(x)
output.square().mean().backward()
assert torch.equal(output, plain)
assert all(p.grad.isfinite().all() for p in model.parameters())
saved = [mesa_train.footprint(model, x, policy=p).saved_bytes for p in ("plain", "mesa8")]
assert saved[0] > 3 * saved[1], saved
from mesa_train.engine import native
print(pathlib.Path(mesa_train.__file__).parent, native.extension is not None)
"""


def python(*arguments, cwd, **variables):
    """The output of a Python process."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **variables},
        capture_output=True,
        text=True,
        timeout=HUNG_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(the sdist, the wheel made of it, the folder that the wheel is installed in)."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("wheel")
    source, dist = folder / "source", folder / "dist"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "mesa_train", source / "mesa_train", ignore=ignored)
    python("-c", BUILD, "build_sdist", dist, cwd=source)
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    unpacked = folder / sdist.name.removesuffix(".tar.gz")
    python("-c", BUILD, "build_wheel", dist, cwd=unpacked)
    (wheel,) = dist.glob("*.whl")
    site = folder / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)  # a wheel of Python files is installed by unpacking it
    return sdist, wheel, site


@pytest.mark.slow
def test_the_wheel_has_every_file_of_the_package(built):
    _, wheel, site = built
    expected = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "mesa_train").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".so"
    }
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if name.startswith("mesa_train/")}
    assert names == expected
    assert any(name.endswith(".cpp") for name in names)
    (entry,) = site.glob("*.dist-info/entry_points.txt")
    assert "mesa-train = mesa_train.cli:app" in entry.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("compiler", [True, False])
def test_the_wheel_runs_without_the_sources(built, tmp_path, compiler):
    _, _, site = built
    if compiler and shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("no C++ compiler")
    variables = {"PYTHONPATH": str(site)}
    if not compiler:
        variables |= {"CXX": "/no/compiler", "MESA_TRAIN_CACHE": str(tmp_path / "cache")}
    output = python("-c", USE, cwd=tmp_path, **variables)
    place, native = output.splitlines()[-1].split()
    assert Path(place) == site / "mesa_train"
    assert native == str(compiler)
    # Without a compiler one line for the kernels and one for the native rows.
    assert output.count("WARNING") == (0 if compiler else 2)
    if not compiler:
        assert "profile" in python("-m", "mesa_train.cli", "--help", cwd=tmp_path, **variables)
