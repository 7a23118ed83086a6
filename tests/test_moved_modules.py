"""Old names of modules work for one release, and say where the module is now."""

import importlib
import subprocess
import sys

import pytest

from mesa_train.moved_modules import MOVED


@pytest.mark.parametrize("name", MOVED)
def test_each_new_place_is_a_module(name):
    assert importlib.util.find_spec(f"mesa_train.{MOVED[name]}") is not None
    assert importlib.util.find_spec(f"mesa_train.{name}") is not None


def test_names_come_from_the_new_place():
    with pytest.warns(DeprecationWarning, match=r"mesa_train\.training\.config is mesa_train"):
        from mesa_train.training.config import DataConfig
    from mesa_train.training.data.config import DataConfig as now

    assert DataConfig is now
    with pytest.warns(DeprecationWarning, match=r"is mesa_train\.training\.data\.sources now"):
        from mesa_train.training import sources
    from mesa_train.training.data import sources as there

    assert sources.load is there.load
    with pytest.raises(ImportError):
        from mesa_train.training.config import NoSuchName  # noqa: F401


def test_a_package_that_is_gone():
    """In a process of its own, where nothing has been imported yet."""
    script = "import warnings; warnings.simplefilter('ignore')\nfrom mesa_train.memory.footprint import footprint\n"
    script += "import mesa_train\nassert footprint is mesa_train.footprint\n"
    script += (
        "try:\n    import mesa_train.memory.nothing\nexcept ModuleNotFoundError: print('none')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "none\n"
