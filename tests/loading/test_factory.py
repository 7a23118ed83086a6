"""Models of a user's own: what a file may return, and one line for what it may not."""

import pytest
import torch
from torch import nn

from mesa_train.loading.inputs import resized
from mesa_train.loading.model import load
from mesa_train.utils.errors import one_line

SOURCE = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x, labels):
        return self.linear(x)


def build(batch_size):
    return Net(), {"x": torch.rand(batch_size, 8), "labels": torch.arange(batch_size)}


def fixed():
    return Net(), (torch.rand(5, 8), torch.arange(5))


def ragged(batch_size):
    return Many(), ([torch.rand(3, 4 + i) for i in range(batch_size)],)


class Many(Net):
    def forward(self, images):
        return images


def bare_list():
    return Many(), [torch.rand(3, 4), torch.rand(3, 5)]


def padded():
    def inputs(count):
        lengths = torch.tensor([3 + i % 5 for i in range(count)])
        if lengths.sum() > 1000:  # reads a value
            raise ValueError("too many")
        return {"x": torch.rand(count, int(lengths.max()), 8), "labels": lengths}

    return Net(), inputs


def reads_a_value():
    scale = torch.rand(3).sum().item()
    net = Net()
    net.scale = scale
    return net, (torch.rand(5, 8), torch.arange(5))


def raises():
    return {}["weights"]


def leaves():
    raise SystemExit(3)


def wants(path):
    return Net()


def three():
    return Net(), torch.rand(5, 8), 3


def nonsense():
    return {"model": Net()}


def text():
    return Net(), "picture.png"


def no_labels():
    return Net(), torch.rand(5, 8)


number = 3
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(SOURCE)
    (tmp_path / "typo.py").write_text("def build(:\n    pass\n")
    (tmp_path / "early.py").write_text("raise KeyError('at import')\n")
    (tmp_path / "needs.py").write_text("import no_such_package\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [str(tmp_path), *__import__("sys").path])
    for name in ("own", "typo", "early", "needs"):
        monkeypatch.delitem(__import__("sys").modules, name, raising=False)
    return tmp_path


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("name", "batch", "shapes"),
    [
        ("own.build", 6, [[6, 8], [6]]),
        ("own.py:build", 6, [[6, 8], [6]]),
        ("own.fixed", 5, [[5, 8], [5]]),
        ("own.ragged", 6, [[3, 4 + i] for i in range(6)]),
        ("own.padded", 6, [[6, 7, 8], [6]]),
        ("own.reads_a_value", 5, [[5, 8], [5]]),
    ],
)
def test_what_a_factory_may_return(name, batch, shapes, device):
    """Also one that reads values, on the meta device."""
    loaded = load(f"python:{name}", batch_size=6, device=device)
    assert loaded.shapes() == shapes
    assert loaded.batch == batch
    tensors = [*loaded.model.parameters(), *torch.utils._pytree.tree_leaves(loaded.inputs)]
    assert {t.device.type for t in tensors} == {device}


def test_a_file_elsewhere(folder, monkeypatch, tmp_path_factory):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    monkeypatch.setattr("sys.path", [p for p in __import__("sys").path if p != str(folder)])
    assert load(f"python:{folder}/own.py:build", batch_size=2).batch == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own.raises", r"python:own.raises failed: KeyError: 'weights' \(own.py, line \d+\)"),
        ("own.leaves", r"failed: SystemExit: 3 \(own.py, line \d+\)"),
        ("own.wants", "missing 1 required positional argument: 'path'"),
        (
            "own.three",
            r"must return a module or \(module, inputs\), got a tuple of Net, Tensor, int",
        ),
        ("own.nonsense", "got dict"),
        ("own.text", "got str without a tensor"),
        ("own.no_labels", r"do not fit Net.forward\(x, labels\): missing .* 'labels'"),
        ("own.bare_list", r"too many positional arguments; for one argument that is a list"),
        ("own.biuld", "close names: build"),
        ("own.number", "must be a function, got int"),
        ("own.py", "python:PATH.py:FACTORY"),
        ("own", "such as python:own.build"),
        ("gone.py:build", "no file gone.py"),
        ("gone.build", "there is no module named 'gone'"),
        ("needs.build", "there is no module named 'no_such_package'"),
        ("typo.build", r"invalid syntax \(typo.py, line 1\)"),
        ("early.build", r"KeyError: 'at import' \(early.py, line 1\)"),
    ],
)
def test_one_line_for_what_it_may_not(name, message):
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        load(f"python:{name}")
    assert len(one_line(caught.value).splitlines()) == 1


def test_a_mistyped_scheme():
    with pytest.raises(ValueError, match=r"did you mean python:own.build\?"):
        load("pyton:own.build")


def test_inputs_of_another_size():
    """By the factory's own function where it gave one, else repeated; without data on meta."""
    loaded = load("python:own.padded", batch_size=2)
    other = resized(loaded.inputs, 2, 7, with_data=False, make=loaded.make)
    assert [t.shape for t in other.values()] == [(7, 7, 8), (7,)]
    assert all(t.is_meta for t in other.values())
    loaded = load("python:own.build", batch_size=2)
    other = resized(loaded.inputs, 2, 5, with_data=True, make=loaded.make)
    assert torch.equal(other["x"][2:4], loaded.inputs["x"])
    loaded = load("python:own.ragged", batch_size=2)
    assert resized(loaded.inputs, 2, 5, with_data=False, make=loaded.make) is None


def test_only_the_user_s_code_is_named():
    with pytest.raises(RuntimeError) as caught:
        nn.Linear(2, 2)(torch.rand(3))
    assert one_line(caught.value).startswith("RuntimeError: ")
    assert "(test_factory.py, line" in one_line(caught.value)
    with pytest.raises(ValueError) as caught:
        load("no_such_model_at_all")
    caught.value.__traceback__ = caught.value.__traceback__.tb_next
    assert one_line(caught.value) == str(caught.value)
