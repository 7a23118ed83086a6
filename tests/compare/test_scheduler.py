"""A process a method: what one breaks is its row's reason, and the next one does not notice."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from limits import HUNG_S

import mesa_train
from mesa_train.compare.batch_size_finder import bisect, largest_batch_on_a_line
from mesa_train.compare.scheduler import Request, _Bench, measure
from mesa_train.methods.spec import DEFAULT, MethodSpec

FACTORY = """
import os, signal, time
import torch
from torch import nn
from mesa_train.engine.modes import innermost


class Moody(nn.Module):
    '''Fails where mesa_train is on, each policy in its own way.'''

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 4))

    def forward(self, x):
        mode = innermost()
        if mode is not None:
            bits = mode.owner.policy.bits
            if bits == 8:
                os.kill(os.getpid(), signal.SIGKILL)
            if bits == 4:
                open("asleep", "w").close()
                time.sleep(36000)
            raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")
        return self.inner(x)


def build(batch_size):
    return Moody(), torch.rand(batch_size, 32)
"""


class Clock:
    """The time, and HUNG_S later as soon as a file is there: a job that writes it has no time left."""

    def __init__(self, file):
        self.file = file

    def monotonic(self):
        return time.monotonic() + 2 * HUNG_S * self.file.exists()

    def __getattr__(self, name):
        return getattr(time, name)


@pytest.mark.slow
def test_failures_are_rows(tmp_path, monkeypatch):
    (tmp_path / "moody.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    for module in ("scheduler", "fork_server"):
        clock = Clock(tmp_path / "asleep")
        monkeypatch.setattr(f"mesa_train.compare.{module}.clock", clock)
    seen = []
    request = Request("python:moody.build", batch_size=64, dtype=None, rounds=1, limit_s=HUNG_S)
    methods = ["plain", "mesa8", "lossless", "mesa4", "checkpoint", "plain+adamw8bit"]
    rows = list(measure(request, methods, lambda *step: seen.append(step)))
    assert [row["method"] for row in rows] == methods
    assert all("broken" not in row for row in rows)
    plain, killed, memory, slow, blocks, last = rows
    assert "note" not in plain
    assert plain["gradient_error"] == 0
    assert killed["note"] == "killed by the system, most likely out of memory"
    assert memory["note"] == "out of memory: tried to allocate 2.00 GiB (moody.py, line 24)"
    assert slow["note"] == f"stopped after {HUNG_S} s"
    assert "no row of equal blocks" in blocks["note"]
    assert last["saved_bytes"] == plain["saved_bytes"]
    assert [*dict.fromkeys(done for _, done, _ in seen)] == list(range(7))
    assert [*dict.fromkeys(what for what, *_ in seen if what)] == [*methods, "done"]
    (tmp_path / "asleep").unlink()
    short = dataclasses.replace(request, total_s=HUNG_S - 1)
    over = f"{HUNG_S - 1} s for all methods were over"
    first, second, third = measure(short, ["mesa4", "plain", "mesa8"])
    assert first["note"] == f"stopped after {HUNG_S - 1} s: {over}"
    assert second["note"] == third["note"] == f"not begun: {over}"
    assert third["caveats"]


@pytest.mark.slow
def test_weights_and_batch_are_the_same_for_all(tmp_path, monkeypatch):
    """Also where the factory draws from a generator of its own."""
    source = (
        "import numpy, torch\n"
        "def build():\n"
        "    model = torch.nn.Linear(8, 4)\n"
        "    random = numpy.random.default_rng()\n"
        "    model.weight.data = torch.from_numpy(random.random((4, 8))).float()\n"
        "    return model, torch.from_numpy(random.random((16, 8))).float()\n"
    )
    (tmp_path / "drawn.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    request = Request("python:drawn.build", dtype=None, rounds=0)
    rows = list(measure(request, ["plain", "lossless"]))
    assert [row.get("gradient_error") for row in rows] == [0, 0]


@pytest.mark.slow
def test_what_compiles_has_a_slot_of_its_own(tmp_path, monkeypatch):
    """Two methods at once, each timed alone: the module notes when its steps begin, and the other
    slot's module, which steps all the time, is held meanwhile."""
    source = (
        "import os, time\nimport torch\nfrom torch import nn\n"
        "class Noted(nn.Sequential):\n"
        "    def __call__(self, x):\n"
        "        with open('steps', 'a') as file:\n"
        "            file.write(f'{os.getpid()}\\n')\n"
        "        return super().__call__(x)\n"
        "def build():\n"
        "    return Noted(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 4)), torch.rand(16, 32)\n"
    )
    (tmp_path / "noted.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    request = Request("python:noted.build", batch_size=16, dtype=None, rounds=6)
    seen = []
    methods = ["plain", "compile", "mesa8", "mesa4", "lossless"]
    rows = list(measure(request, methods, lambda *step: seen.append(step)))
    assert sorted(row["method"] for row in rows) == sorted(methods)
    assert [row["method"] for row in rows if row["method"] != "compile"] == [
        method for method in methods if method != "compile"
    ]
    assert [row.get("note") for row in rows] == [None] * 5
    assert all(len(row["times_ms"]) == 6 for row in rows)
    assert any("compile" in what and "," in what for what, *_ in seen)
    steps = (tmp_path / "steps").read_text().split()
    for process in dict.fromkeys(steps):
        last = [place for place, step in enumerate(steps) if step == process][-6:]
        assert last == list(range(last[0], last[0] + 6))


def test_what_compiles_waits_for_memory(monkeypatch):
    """Where the first method took too much of it, there is one slot."""
    monkeypatch.setattr("mesa_train.compare.scheduler._available", lambda: 2.9e9)
    bench = _Bench(Request("m"), ["plain", "compile"], Path(), [])
    assert (bench.first_slot, bench.either_slot) == ([0], [1])
    bench.first, bench.reference = {"resident_bytes": 10**9}, Path(__file__)
    waiting = threading.Thread(target=bench._wait_for_memory)
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    assert [bench._take(True), bench._take(True), bench._take(True)] == [0, 1, None]
    waiting.join(HUNG_S)
    assert not waiting.is_alive()


def test_a_model_that_fails_by_itself(tmp_path, monkeypatch):
    """No method could do better: one error, and no row."""
    (tmp_path / "broken.py").write_text(
        "import torch\n"
        "class Broken(torch.nn.Linear):\n"
        "    def forward(self, x):\n"
        "        return super().forward(x) @ x\n"
        "def build():\n"
        "    return Broken(8, 4), torch.rand(16, 8)\n"
    )
    monkeypatch.chdir(tmp_path)
    request = Request("python:broken.build", dtype=None, rounds=0)
    with pytest.raises(ValueError, match=r"fails by itself.*RuntimeError.*\(broken.py, line 4\)"):
        next(measure(request, ["plain", "mesa8"]))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_an_interrupt_keeps_the_rows_and_leaves_nothing_running(tmp_path):
    (tmp_path / "slow.py").write_text(
        "import os, time, torch\nfrom torch import nn\nfrom mesa_train.engine.modes import innermost\n"
        "class Slow(nn.Sequential):\n"
        "    def forward(self, x):\n"
        "        if innermost() is not None:\n"
        "            open('child', 'w').write(str(os.getpid()))\n"
        "            time.sleep(36000)\n"
        "        return super().forward(x)\n"
        "def build():\n"
        "    return Slow(nn.Linear(32, 4), nn.GELU()), torch.rand(16, 32)\n"
    )
    command = [sys.executable, "-m", "mesa_train.cli", "compare", "python:slow.build"]
    options = ["--methods", "plain,mesa8,mesa4", "--rounds", "1", "--out", "out"]
    source = str(Path(mesa_train.__file__).parents[1])
    running = subprocess.Popen(
        [*command, *options],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": source},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts what runs in the background with interrupts ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    child = tmp_path / "child"
    while running.poll() is None and not (child.exists() and child.read_text()):
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    out, errors = running.communicate(timeout=HUNG_S)
    assert running.returncode == 130, errors
    assert "mesa-train: stopped with 1 of 3 methods done" in errors
    assert "Traceback" not in errors
    assert "plain" in out
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert [row["method"] for row in rows] == ["plain"]
    assert (tmp_path / "out" / "report.html").exists()
    end = time.monotonic() + HUNG_S
    while lives(child.read_text()) and time.monotonic() < end:
        time.sleep(0.05)
    assert not lives(child.read_text())


@pytest.mark.slow
def test_a_script_without_a_guard_of_its_main_module_runs_once_and_leaves_no_process(tmp_path):
    """A worker that imported the script again would start a comparison of its own."""
    (tmp_path / "model.py").write_text(
        "import torch\ndef build():\n    return torch.nn.Linear(8, 4), torch.rand(16, 8)\n"
    )
    (tmp_path / "script.py").write_text(
        "import os\nfrom pathlib import Path\n"
        "from mesa_train.compare.scheduler import Request, measure\n"
        "print('begins', flush=True)\n"
        "for row in measure(Request('python:model.build', dtype=None, rounds=0), ['plain']):\n"
        "    print(row['method'], row.get('note'))\n"
        "tasks = Path(f'/proc/{os.getpid()}/task').glob('*/children')\n"
        "print('children:', ''.join(task.read_text() for task in tasks))\n"
    )
    source = str(Path(mesa_train.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": source},
        capture_output=True,
        text=True,
        timeout=HUNG_S,
    )
    assert done.stdout.splitlines() == ["begins", "plain None", "children: "], done.stderr


def lives(process):
    """Whether a process is there, and no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_offloading_needs_a_gpu():
    """Said before the model is asked for."""
    (row,) = measure(Request("vit_of_nobody"), ["mesa8+offload"])
    assert row["method"] == "mesa8+offload"
    assert row["note"] == "needs a GPU: on a CPU all saved tensors are in CPU memory already"
    assert MethodSpec.of("mesa8+offload+adamw8bit").why_not("cpu") == row["note"]
    assert MethodSpec.of("mesa8+offload").why_not("cuda:0") is None
    assert MethodSpec.of("mesa8").why_not("cpu") is None


class TestContenders:
    def test_all_have_something_to_say(self):
        for name in DEFAULT:
            spec = MethodSpec.of(name)
            assert spec.name == name
            assert name in ("plain",) or spec.caveats

    def test_parts(self, tmp_path):
        assert MethodSpec.of("mesa8+adamw8bit").eight_bit
        assert MethodSpec.of("mesa8+adamw8bit").variant == "mesa8"
        assert MethodSpec.of("float32").variant == "plain"
        assert not MethodSpec.of("compile:mesa8").countable
        assert MethodSpec.of("mesa8+checkpoint").countable
        path = tmp_path / "p.yaml"
        path.write_text("bits: 4\n")
        assert MethodSpec.of(f"{path}+adamw8bit").variant.bits == 4
        redrawn = MethodSpec.of("compile-budget-0.2").caveats
        assert any("190758" in caveat for caveat in redrawn)

    @pytest.mark.parametrize("name", ["mesa9", "adamw8bit", "mesa8+adam", "checkpoint+mesa8", ""])
    def test_unknown(self, name):
        with pytest.raises(ValueError, match="unknown method"):
            MethodSpec.of(name)

    def test_none(self):
        with pytest.raises(ValueError, match="needs a method"):
            next(measure(Request("resnet18"), []))


class TestFitting:
    @pytest.mark.parametrize("limit", [1, 2, 3, 17, 64, 100, 1000])
    @pytest.mark.parametrize("guess", [1, 16, 300])
    def test_bisect(self, limit, guess):
        tried = []

        def fits(batch):
            tried.append(batch)
            return batch <= limit

        found = bisect(fits, guess)
        assert found <= limit
        assert limit - found <= max(1, 0.02 * limit)
        assert len(tried) < 20

    def test_nothing_fits(self):
        assert bisect(lambda batch: False, 64) == 0

    def test_line(self):
        # 1000 bytes of gradients at the end, or 100 + 7 an image at the start of the backward.
        def peak(batch):
            return max(1000 + batch, 100 + 7 * batch)

        found = largest_batch_on_a_line(peak, 70_100, 3000, 7.0, 1000)
        assert found == 10_000
        assert peak(found) <= 70_100 < peak(found + 1)
        assert largest_batch_on_a_line(peak, 50, 1, 7.0, 1000) == 0
