"""`mesa-train run`: scripts that do not know mesa_train, with the model found, named once, or refused."""

import re
import sys
import textwrap

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import mesa_train
from mesa_train.cli import app
from mesa_train.engine.wrap import policy_of
from mesa_train.integrations.finder import AmbiguousModel, ModelFinder

HEAD = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.body = nn.LayerNorm(64), nn.Linear(64, 256)
        self.head = nn.Linear(256, 5)
    def forward(self, x):
        return self.head(nn.functional.gelu(self.body(self.norm(x))))

torch.manual_seed(0)
def train(model, optimizer, backward=torch.Tensor.backward):
    for seed in range(2):
        x = torch.randn(64, 64, generator=torch.Generator().manual_seed(seed))
        backward(model(x).square().mean())
        optimizer.step()
        optimizer.zero_grad()
"""


def run(tmp_path, body, *arguments, options=()):
    """(exit status, stdout, stderr) of a script under `mesa-train run`."""
    script = tmp_path / "train.py"
    script.write_text(HEAD + textwrap.dedent(body))
    result = CliRunner().invoke(app, ["run", *options, str(script), *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_the_model_of_an_optimizer_is_wrapped_and_said_in_one_line(tmp_path):
    code, out, err = run(
        tmp_path,
        """
        import sys, mesa_train
        model = Net()
        train(model, torch.optim.AdamW(model.head.parameters(), lr=0.1))
        print(sys.argv[1:], __name__, {r.how for r in mesa_train.coverage(model).rows})
        """,
        "--policy",
        "mine",
        options=["--policy", "mesa4"],
    )
    assert code == 0
    assert out.startswith("['--policy', 'mine'] __main__")
    # mesa4: the last norm, and the input of the activation.
    assert "8 bits in groups of 128, nearest" in out
    assert "5 bits in groups of 192, nearest" in out
    lines = err.strip().splitlines()
    assert lines == ["mesa-train run: wrapped Net (18,053 parameters, 4 modules), found at AdamW"]
    assert torch.optim.Optimizer.__init__.__module__ == "torch.optim.optimizer"
    assert not hasattr(torch.optim.Optimizer.__init__, "__wrapped__")


TAKERS = {
    "accelerate, model first": """
        from accelerate import Accelerator
        accelerator = Accelerator(cpu=True)
        model = accelerator.prepare(Net())
        optimizer = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.1))
        train(model, optimizer, accelerator.backward)
        inner = accelerator.unwrap_model(model)
        """,
    "accelerate, together": """
        from accelerate import Accelerator
        accelerator = Accelerator(cpu=True)
        inner = Net()
        model, optimizer = accelerator.prepare(inner, torch.optim.SGD(inner.parameters(), lr=0.1))
        train(model, optimizer, accelerator.backward)
        """,
    "DDP": """
        from torch.nn.parallel import DistributedDataParallel
        torch.distributed.init_process_group(
            "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        inner = Net()
        model = DistributedDataParallel(inner)
        train(model, torch.optim.SGD(model.parameters(), lr=0.1))
        torch.distributed.destroy_process_group()
        """,
    "fully_shard": """
        from torch.distributed.fsdp import fully_shard
        torch.distributed.init_process_group(
            "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        inner = model = Net()
        fully_shard(model.body, mesh=mesh)
        fully_shard(model, mesh=mesh)
        train(model, torch.optim.SGD(model.parameters(), lr=0.1))
        torch.distributed.destroy_process_group()
        """,
}


@pytest.mark.parametrize("taker", TAKERS)
@pytest.mark.filterwarnings("ignore")  # the libraries' own
def test_every_taker_finds_the_whole_model_once(tmp_path, taker):
    body = (
        TAKERS[taker]
        + """
        from mesa_train.engine.wrap import policy_of, report_of
        print(policy_of(inner) is not None, bool(report_of(inner).rows))
        """
    )
    code, out, err = run(tmp_path, body)
    assert code == 0
    assert out.strip().endswith("True True")
    assert re.findall(r"wrapped (\w+)", err) == ["Net"]


def test_two_parents_are_refused_and_a_name_decides(tmp_path):
    body = """
        class Student(nn.Module):
            def __init__(self, net):
                super().__init__()
                self.net = net
        class Monitor(Student):
            pass
        net = Net()
        student, monitor = Student(net), Monitor(net)
        train(net, torch.optim.SGD(net.parameters(), lr=0.1))
        """
    code, _, err = run(tmp_path, body)
    assert code == 2
    assert len(err.strip().splitlines()) == 1
    assert "Student" in err
    assert "Monitor" in err
    assert "--model" in err
    code, _, err = run(tmp_path, body, options=["--model", "Net"])
    assert code == 0
    assert "wrapped Net" in err
    code, _, err = run(tmp_path, body, options=["--model", "Nett"])
    assert code == 2
    assert "choose from" in err


def test_two_models_are_two_lines_and_a_frozen_teacher_is_none():
    generator, critic, teacher = nn.Linear(4, 4), nn.Linear(4, 1), nn.Linear(4, 4)
    teacher.requires_grad_(False)
    lines = []
    with ModelFinder(mesa_train.Policy(), lines.append).watching() as finder:
        torch.optim.SGD(generator.parameters(), lr=0.1)
        torch.optim.SGD([*critic.parameters(), *teacher.parameters()], lr=0.1)
        torch.optim.SGD(iter(generator.parameters()), lr=0.1)
    assert finder.models == [generator, critic]
    assert len(lines) == 2
    assert policy_of(teacher) is None


def test_a_script_that_wraps_itself_keeps_its_policy():
    model = mesa_train.wrap(nn.Linear(4, 4), "mesa4")
    lines = []
    with ModelFinder(mesa_train.Policy(), lines.append).watching():
        torch.optim.SGD(model.parameters(), lr=0.1)
    assert policy_of(model) == mesa_train.PRESETS["mesa4"]
    assert "itself" in lines[0]


def test_same_classes_are_refused_with_a_remedy_in_the_script():
    model = nn.Linear(4, 4)
    parents = [nn.Sequential(model), nn.Sequential(model)]
    with (
        ModelFinder(mesa_train.Policy()).watching(),
        pytest.raises(AmbiguousModel, match=r"mesa_train\.wrap"),
    ):
        torch.optim.SGD(model.parameters(), lr=0.1)
    assert all(policy_of(m) is None for m in [model, *parents])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.py"], "no file nothing.py"),
        (["--module", "no_such_module"], "no module no_such_module"),
        (["--policy", "mesa9", "nothing.py"], "unknown preset 'mesa9'"),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    result = CliRunner().invoke(app, ["run", *arguments])
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert message in result.stderr


def test_the_scripts_own_errors_and_exit_codes_pass(tmp_path):
    path = list(sys.path)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, "1 / 0")
    code, _, err = run(tmp_path, "raise SystemExit(7)")
    assert code == 7
    code, _, err = run(tmp_path, "pass")
    assert code == 0
    assert "wrapped nothing" in err
    assert sys.path == path


@pytest.mark.skipif(sys.version_info < (3, 11), reason="notes of errors: Python 3.11")
def test_an_out_of_memory_error_says_what_was_saved(tmp_path):
    body = """
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        def backward(loss):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        train(model, optimizer, backward)
        """
    with pytest.raises(torch.OutOfMemoryError) as raised:
        run(tmp_path, body)
    assert "with mesa8, Net saves" in raised.value.__notes__[0]
