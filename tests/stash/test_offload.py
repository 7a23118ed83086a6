"""Offload: what is offloaded comes back the same and in time, once, and nothing is left behind."""

import copy
import gc
import types
import weakref

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

import mesa_train
from mesa_train.engine.wrap import report_of
from mesa_train.measure.footprint import footprint
from mesa_train.measure.step import relative_error
from mesa_train.measure.timeline import timeline
from mesa_train.policy import Policy
from mesa_train.stash import offload as module
from mesa_train.stash.offload import WINDOW, OffloadStream, through


class LateOffloadStream(OffloadStream):
    """Both ends on the CPU. A copy is made as late as it may be: when somebody waits for it. Who does
    not wait reads rubbish, and who gives a tensor up too early is found out."""

    def __init__(self):
        super().__init__()
        self.queue, self.log, self.made = {}, [], 0

    def out(self, tensors):
        host = tuple(torch.full_like(t, 77) for t in tensors)
        return host, self._later("out", tensors, host, [], held=0)

    def prefetch(self, tensors, after):
        found = tuple(torch.full_like(t, 77) for t in tensors)
        return found, self._later("home", tensors, found, [after], held=1)

    def wait(self, ticket, tensors=()):
        entry = self.queue.pop(ticket, None)
        if entry is None:
            return
        sources, targets, after = entry
        for earlier in after:
            self.wait(earlier)
        for source, target in zip(sources, targets, strict=True):
            source, target = (t() if isinstance(t, weakref.ref) else t for t in (source, target))
            assert all(t is not None for t in (source, target)), "given up before it was copied"
            target.data.copy_(source)  # As a device does it: unseen by versions.

    def _later(self, kind, sources, targets, after, held):
        # Main memory is its allocator's business; the device's end is ours.
        ends = [sources, targets]
        ends[held] = [weakref.ref(t) for t in ends[held]]
        self.made += 1
        self.queue[self.made] = (*ends, after)
        self.log.append(kind)
        return self.made


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5).train()


def policy(**changes):
    return Policy(**{"min_bytes": 0, "offload": True, **changes})


def gradients(model, given, offload_stream=None, inputs=None, times=1):
    mesa_train.wrap(model, given)
    try:
        model.zero_grad()
        x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        with through(offload_stream):
            loss = model(x if inputs is None else inputs).square().mean()
        for number in range(times):
            loss.backward(retain_graph=number + 1 < times)
        return [p.grad.clone() for p in model.parameters()]
    finally:
        mesa_train.unwrap(model)


def same(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


class TestTheWay:
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"bits": 32},
            {"bits": 4, "recompute": "linear"},
            {"recompute": "none"},
            {"ranges": "running"},
            {"checkpoint": ("blocks.*",), "checkpoint_inputs": 8},
            {"checkpoint": ("blocks.*",), "checkpoint_inputs": 32},
            {"overrides": {"blocks.0": {"offload": False}}},
        ],
    )
    def test_gradients_are_the_same_to_the_bit(self, vit, changes):
        offload_stream = LateOffloadStream()
        offloaded = gradients(vit, policy(**changes), offload_stream)
        assert "out" in offload_stream.log
        assert not offload_stream.queue.keys() - {0}
        assert same(offloaded, gradients(vit, policy(**{**changes, "offload": False})))
        assert not offload_stream._arrived
        assert not any(r() for r in offload_stream._leaving)

    def test_a_shared_stash_goes_once_and_what_left_last_does_not_come_back(self, vit):
        offload_stream = LateOffloadStream()
        gradients(vit, policy(), offload_stream)
        # Of each block: two x_hats, q, k, v, the attention's output, GELU's input. And the last norm's
        # x_hat and the patches.
        assert offload_stream.log.count("out") == 2 * 7 + 2
        assert offload_stream.log.count("home") == offload_stream.log.count("out") - WINDOW

    @pytest.mark.parametrize("recompute", ["linear", "none"])
    def test_what_came_back_goes_with_its_last_reader(self, vit, recompute):
        """A leaf beneath a shared product waited for a reader that never fetched it."""
        offload_stream, left = LateOffloadStream(), []

        def count(*_):
            arrived = offload_stream._arrived
            read = [m for m, a in arrived.items() if a.left < m.uses.count]
            left.append(len(read))

        handle = vit.blocks[0].register_full_backward_hook(count)
        gradients(vit, policy(recompute=recompute), offload_stream)
        handle.remove()
        assert left == [0]

    def test_as_many_are_on_their_way_as_the_window_says(self, vit):
        offload_stream, most = LateOffloadStream(), {"out": 0, "home": 0}

        def watched(kind, plain):
            def run(*args):
                result = plain(*args)
                out = [r for r in offload_stream._leaving if r() and r().leaving]
                home = [m for m, a in offload_stream._arrived.items() if a.left == m.uses.count]
                most[kind] = max(most[kind], len(out if kind == "out" else home))
                return result

            return run

        offload_stream.send, offload_stream.fetch = (
            watched("out", offload_stream.send),
            watched("home", offload_stream.fetch),
        )
        gradients(vit, policy(), offload_stream)
        # An attention that has read q is about to read k and v.
        assert most == {"out": WINDOW, "home": WINDOW + 2}

    def test_a_kept_graph_runs_twice_and_a_freed_one_says_so(self, vit):
        offload_stream = LateOffloadStream()
        twice = gradients(vit, policy(), offload_stream, times=2)
        assert same(twice, gradients(vit, policy(offload=False), times=2))
        mesa_train.wrap(vit, policy())
        with through(offload_stream):
            loss = vit(torch.randn(2, 3, 32, 32)).sum()
        loss.backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()

    def test_two_forwards_before_their_backwards_and_one_that_has_none(self, vit):
        mesa_train.wrap(vit, policy())
        offload_stream, images = LateOffloadStream(), torch.randn(3, 2, 3, 32, 32)
        with through(offload_stream):
            losses = [vit(x).square().sum() for x in images]
        vit.zero_grad()
        del losses[1]
        for loss in losses:
            loss.backward()
        found = [p.grad.clone() for p in vit.parameters()]
        vit.zero_grad()
        for x in images[[0, 2]]:
            vit(x).square().sum().backward()
        mesa_train.unwrap(vit)
        assert same(found, [p.grad for p in vit.parameters()])
        gc.collect()
        assert not any(r() and r().leaving for r in offload_stream._leaving)

    def test_a_part_of_the_graph_and_an_error_leave_nothing(self, vit):
        mesa_train.wrap(vit, policy())
        offload_stream = LateOffloadStream()
        with through(offload_stream):
            loss = vit(torch.randn(2, 3, 32, 32)).square().sum()
        (last,) = torch.autograd.grad(loss, [vit.norm.weight], retain_graph=True)
        assert not offload_stream._arrived

        def broken(_):
            raise ZeroDivisionError

        handle = vit.blocks[0].norm2.weight.register_hook(broken)
        with pytest.raises(ZeroDivisionError):
            loss.backward(retain_graph=True)
        handle.remove()
        vit.zero_grad()
        loss.backward()
        mesa_train.unwrap(vit)
        assert torch.equal(vit.norm.weight.grad, last)
        assert not offload_stream._arrived

    def test_a_saved_tensor_that_is_looked_at_outside_of_a_backward_waits_too(self):
        """PyTorch's nodes show what they saved: nothing is called ahead for that, and nothing stays."""
        offload_stream, x = LateOffloadStream(), torch.randn(4, 64, requires_grad=True)
        with through(offload_stream), mesa_train.compress(policy(bits=32)):
            y = (2.0 * x).pow(3.0)
        assert offload_stream.log == ["out"]
        assert torch.equal(y.grad_fn._saved_self, 2.0 * x)
        assert offload_stream.log == ["out", "home"]
        assert not offload_stream._arrived

    def test_many_steps_under_one_context(self):
        layers = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
        with through(LateOffloadStream()), mesa_train.compress(policy()) as mode:
            for _ in range(5):
                layers(torch.randn(4, 64)).sum().backward()
            assert len(mode.recorder.order) == 2

    def test_a_tensor_that_is_written_to_afterwards(self):
        offload_stream, x = LateOffloadStream(), torch.randn(4, 64, requires_grad=True)
        results = []
        for given in (offload_stream, None):
            with through(given), mesa_train.compress(policy(bits=32, recompute="none")):
                y = x * 1
                z = F.gelu(y)
                if given is not None:
                    y.detach().mul_(3)
            results += torch.autograd.grad(z.sum(), x)
        assert torch.equal(*results)


class TestWhoElseMoves:
    def test_under_save_on_cpu_it_is_moved_by_that_alone(self, vit):
        offload_stream = LateOffloadStream()
        mesa_train.wrap(vit, policy())
        with through(offload_stream), save_on_cpu():
            vit(torch.randn(2, 3, 32, 32)).sum().backward()
        assert not offload_stream.log
        assert not any(", offloaded" in row[3] for row in report_of(vit).rows)
        mesa_train.unwrap(vit)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_a_recompute_moves_nothing(self, reentrant):
        offload_stream = LateOffloadStream()
        block = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
        mesa_train.wrap(block, policy())
        x = torch.randn(4, 64, requires_grad=True)
        with through(offload_stream):
            checkpoint(block, x, use_reentrant=reentrant).sum().backward()
        assert not offload_stream.log

    @pytest.mark.parametrize("whole", [False, True])
    def test_the_policy_is_for_eager_models(self, whole):
        model = mesa_train.wrap(nn.Linear(64, 64), policy())
        offload_stream, x = LateOffloadStream(), torch.randn(4, 64)
        with through(offload_stream), pytest.raises(Exception, match="offload=True moves what"):
            torch.compile(model, backend="eager", fullgraph=whole)(x)
        assert not offload_stream.log
        # Where there is nothing to move it compiles like any other.
        torch.compile(model, backend="eager", fullgraph=whole)(x).sum().backward()


class TestOnACpu:
    @pytest.mark.parametrize("bits", [8, 32])
    def test_nothing_is_moved_nor_copied(self, bits):
        model = mesa_train.wrap(nn.Linear(64, 64), policy(bits=bits))
        x = torch.randn(4, 64)
        saved = model(x).grad_fn.saved_tensors
        assert not any(", offloaded" in row[3] for row in report_of(model).rows)
        assert all(t.device.type == "cpu" and not t.is_pinned() for t in saved)
        if bits == 32:
            assert x.data_ptr() in [t.data_ptr() for t in saved]


@pytest.fixture(scope="module")
def meta(vit):
    return copy.deepcopy(vit).to("meta")


@pytest.fixture(scope="module")
def images():
    return torch.randn(64, 3, 32, 32, device="meta")


class TestCounted:
    """On tensors without data: what is offloaded leaves the device, and takes nothing of its peak."""

    @pytest.mark.parametrize("bits", [8, 32])
    def test_every_byte_is_here_or_there(self, meta, images, bits):
        here = footprint(meta, images, policy=policy(bits=bits, offload=False))
        there = footprint(meta, images, policy=policy(bits=bits))
        assert here.offloaded_bytes == 0
        assert there.saved_bytes + there.offloaded_bytes == here.saved_bytes
        offloaded = sum(r.bytes for r in there.stored.rows if r.how.endswith(", offloaded"))
        assert there.offloaded_bytes == offloaded > 0.9 * here.saved_bytes
        assert sum(there.by_operator.values()) == there.saved_bytes
        assert "in CPU memory" in str(there)
        assert "in CPU memory" not in str(here)

    def test_the_peak_has_what_is_on_its_way(self, meta, images):
        everything = timeline(meta, images, policy=policy(bits=32, offload=False))
        offloaded = timeline(meta, images, policy=policy(bits=32))
        most = max(r.saved_bytes for r in footprint(meta, images, policy=policy(bits=32)).rows)
        highest = max(m.peak_bytes for m in everything.moments if m.phase == "forward")
        out = max(m.peak_bytes for m in offloaded.moments if m.phase == "forward")
        kept = footprint(meta, images, policy=policy(bits=32)).offloaded_bytes
        assert highest - kept <= out <= highest - kept + (WINDOW + 1) * most

    def test_a_cpu_has_nothing_to_move(self, vit):
        x = torch.randn(2, 3, 32, 32)
        for fake in (False, True):
            found = footprint(vit, x, policy=policy(), fake=fake)
            assert (found.offloaded_bytes, found.saved_bytes) == (
                0,
                footprint(vit, x, policy=policy(offload=False), fake=fake).saved_bytes,
            )
        on_gpu = footprint(vit, x, policy=policy(), fake=True, device="cuda")
        assert on_gpu.offloaded_bytes > 0.9 * found.saved_bytes


@pytest.fixture(scope="module")
def setting():
    model = timm.create_model("vit_small_patch16_224", depth=8, num_classes=10).cuda().train()
    return model, torch.randn(64, 3, 224, 224, device="cuda")


@pytest.mark.gpu
class TestOnAGpu:
    """On real hardware: bits, bytes and that the copies run beside the arithmetic."""

    @staticmethod
    def step(model, x):
        model.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(x).float().square().mean()
        torch.cuda.synchronize()
        kept = torch.cuda.memory_allocated()
        loss.backward()
        torch.cuda.synchronize()
        return kept, [p.grad.clone() for p in model.parameters()]

    @pytest.mark.parametrize("bits", [8, 32])
    def test_gradients_and_bytes(self, setting, bits):
        model, x = setting
        found = {}
        for offload in (False, True):
            mesa_train.wrap(model, Policy(bits=bits, offload=offload))
            self.step(model, x)
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            kept, own = self.step(model, x)
            found[offload] = kept, torch.cuda.max_memory_allocated(), own
            leaves = [
                row[1] for key, row in report_of(model).rows.items() if ", offloaded" in key[3]
            ]
            del own
            model.zero_grad(set_to_none=True)
            gc.collect()
            assert offload == bool(leaves)
            assert torch.cuda.memory_allocated() <= before
        # To the bit, but for kernels that sum in whatever order their threads come.
        mesa_train.wrap(model, Policy(bits=bits))
        _, again = self.step(model, x)
        spread = relative_error(again, found[False][2])
        assert relative_error(found[True][2], found[False][2]) <= 2 * spread
        # What is still on its way when the forward ends: the last leaves, none above the largest.
        offloaded, in_flight = sum(leaves), WINDOW * max(leaves)
        assert found[False][0] - found[True][0] >= offloaded - in_flight
        assert found[False][1] - found[True][1] >= offloaded - 3 * in_flight
        mesa_train.unwrap(model)

    def test_copies_run_beside_the_arithmetic(self, setting):
        model, x = setting
        mesa_train.wrap(model, Policy(offload=True))
        self.step(model, x)
        kinds = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=kinds) as profile:
            self.step(model, x)
        mesa_train.unwrap(model)
        events = [e for e in profile.profiler.kineto_results.events() if e.duration_ns() > 0]
        kernels = [e for e in events if "gemm" in e.name().lower() or "nvjet" in e.name().lower()]
        for direction in ("DtoH", "HtoD"):
            copies = [e for e in events if direction in e.name() and "Pinned" in e.name()]
            assert copies
            assert any(
                c.start_ns() < k.end_ns() and k.start_ns() < c.end_ns()
                for c in copies
                for k in kernels
            )


def test_a_gpu_has_one_offload_stream(monkeypatch):
    """Else copies of one device would not wait for one another."""
    monkeypatch.setattr(module, "_offload_streams", {})
    monkeypatch.setattr(
        module, "CudaOffloadStream", lambda device: types.SimpleNamespace(device=device)
    )
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    first, second = (module.offload_stream_of(torch.device("cuda", index)) for index in (0, 1))
    assert (first.device.index, second.device.index) == (0, 1)
    assert module.offload_stream_of(torch.device("cuda", 0)) is first
    assert module.offload_stream_of(torch.device("cuda")) is second
    assert module.offload_stream_of(torch.device("cpu")) is None
