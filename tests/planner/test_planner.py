"""Plans: what is predicted is what a real step takes, budgets hold, and the choice is the best one."""

import dataclasses
import json
import math
import os

import pytest
import timm
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

import mesa_train
from mesa_train.engine.modes import innermost
from mesa_train.engine.wrap import policy_of
from mesa_train.measure.footprint import footprint
from mesa_train.measure.profiling.candidates import KEEP, OFFLOADED_AS
from mesa_train.measure.profiling.search_space import SearchSpace
from mesa_train.measure.profiling.times import OpTimings
from mesa_train.measure.runner import StepRunner
from mesa_train.measure.step import default_loss, relative_error
from mesa_train.measure.timeline import timeline
from mesa_train.planner.plan import OverBudget, Plan, Prediction
from mesa_train.planner.planner import Planner
from mesa_train.policy import Policy

pytest.importorskip("highspy")

BF16 = torch.bfloat16


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("XDG_CACHE_HOME")
    if before is not None:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=10).train()


@pytest.fixture(scope="module")
def images():
    torch.manual_seed(1)
    return torch.randn(32, 3, 64, 64)


@pytest.fixture(scope="module")
def planner(vit, images):
    return Planner.of(vit, images)


@pytest.mark.slow
class TestPlans:
    @pytest.mark.parametrize("share", [0.02, 0.2, 0.5])
    def test_predictions_hold(self, planner, vit, images, share):
        low = planner.plan().prediction.peak_bytes
        budget = int(low + share * (planner.plain.peak_bytes - low))
        plan = planner.plan(budget)
        prediction = plan.prediction
        assert prediction.peak_bytes <= budget
        saved = footprint(vit, images, policy=plan.policy, loss=planner.model.loss)
        assert prediction.saved_bytes == saved.saved_bytes
        runs = StepRunner(vit, images, None, planner.model.loss)
        # Kernels' workspace is measured at two policies; at others it may differ.
        assert planner.static + runs.peak(plan.policy) == pytest.approx(
            prediction.peak_bytes, rel=0.05
        )
        error = relative_error(runs.gradients(plan.policy), runs.reference())
        # Additive variances, shared out and extrapolated: right to a factor.
        assert prediction.gradient_error / 2 < error < prediction.gradient_error * 2
        assert prediction.time_ratio > 0

    def test_what_stands_outside_of_blocks_is_measured_alone(self, planner, vit, images):
        """The last norm feeds the classifier, so the weights around it do not show its error."""
        space = planner.model.space
        key = ("norm", "layer_norm", "normalized")
        assert key in {
            candidate.key for candidate in planner.profile.candidates if candidate.block is None
        }
        runs = StepRunner(vit, images, None, planner.model.loss)
        saved = space.all(KEEP)
        reference = runs.gradients(space.policy(saved))
        coded = runs.gradients(space.policy({**saved, key: 4}))
        measured = relative_error(coded, reference) ** 2
        assert planner.profile.sensitivity.variance[key, 4] == pytest.approx(measured, rel=1e-3)

    def test_room_for_everything_is_plain(self, planner):
        plan = planner.plan("100GiB")
        assert not plan.policy.enabled
        assert plan.prediction == planner.plain

    def test_smaller_budgets_cost_more(self, planner):
        plans = planner.frontier(points=4)
        peaks = [p.prediction.peak_bytes for p in plans]
        timings = [p.cost for p in plans]
        assert len(plans) >= 2
        assert peaks == sorted(peaks)
        assert timings == sorted(timings, reverse=True)

    def test_impossible(self, planner):
        with pytest.raises(OverBudget, match=r"smallest possible peak is .* MiB") as raised:
            planner.plan(planner.static + 1000)
        assert raised.value.smallest.prediction.peak_bytes == planner.plan().prediction.peak_bytes

    def test_error_is_a_bound(self, planner):
        loose = planner.plan()
        tight = planner.plan(max_error=0.02)
        assert tight.prediction.peak_bytes > loose.prediction.peak_bytes
        added = tight.prediction.gradient_error**2 - planner.profile.sensitivity.floor
        assert added <= 0.02**2 * (1 + 1e-6)

    def test_time_is_a_bound(self, planner):
        ratio = planner.plan(max_error=0.02).prediction.time_ratio
        plan = planner.plan(max_time=max(1.0, ratio - 0.02), max_error=0.5)
        assert plan.prediction.time_ratio <= max(1.0, ratio - 0.02) + 1e-6

    def test_yaml(self, planner):
        low = planner.plan().prediction.peak_bytes
        plan = planner.plan((low + planner.plain.peak_bytes) // 2)
        assert Policy.from_yaml(plan.policy.to_yaml()) == plan.policy

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"budget": "many"}, "a size must be a number with a unit"),
            ({"budget": 0}, "budget must be bytes above 0 or text"),
            ({"max_time": 0.5}, "at least 1"),
            ({"max_error": 0.0}, "above 0"),
        ],
    )
    def test_bad_bounds(self, planner, arguments, message):
        with pytest.raises(ValueError, match=message):
            planner.plan(**arguments)


@pytest.mark.slow
def test_wrap_with_a_budget():
    blocks = [
        (nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), nn.LayerNorm(64)) for _ in range(5)
    ]
    model = nn.Sequential(*[layer for block in blocks for layer in block])
    x = torch.randn(512, 64)
    model(x).sum().backward()
    before = [p.grad for p in model.parameters()]
    smallest = mesa_train.plan(model, x)
    budget = (smallest.prediction.peak_bytes + smallest.plain.peak_bytes) // 2
    mesa_train.wrap(model, budget=budget, inputs=x)
    assert policy_of(model).overrides
    assert all(p.grad is g for p, g in zip(model.parameters(), before, strict=True))
    saved = footprint(model, x).saved_bytes
    assert saved < smallest.plain.saved_bytes
    for arguments in ({"budget": 8}, {"budget": 8, "inputs": x, "policy": "mesa8"}, {"inputs": x}):
        with pytest.raises(ValueError, match="budget"):
            mesa_train.wrap(model, **arguments)


def test_the_predicted_error_adds_variances():
    """Of keeping everything, which is bf16's own, and of the codes: squares add up."""
    layers = [
        layer for _ in range(3) for layer in (nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
    ]
    planner = Planner.of(nn.Sequential(*layers), torch.randn(256, 32))
    # As large as what the codes add, so that the larger of the two is far from both together.
    added = planner.plan().prediction.gradient_error ** 2 - planner.profile.sensitivity.floor
    floored = dataclasses.replace(planner.profile.sensitivity, floor=added)
    planner.profile = dataclasses.replace(planner.profile, sensitivity=floored)
    assert planner.plan().prediction.gradient_error == pytest.approx(math.sqrt(2 * added))


def test_an_error_of_5_percent_costs_as_much_as_10_percent_of_the_step():
    """As docs/internals/planner.md says, and four times as much for twice the error."""

    def cost(time_ratio, error):
        prediction = Prediction(0, 0, 1.0, time_ratio, error)
        return Plan(Policy(), prediction, {}, 0.0, prediction).cost

    assert cost(1.0, 0.05) == pytest.approx(cost(1.1, 0.0))
    assert cost(1.0, 0.10) == pytest.approx(cost(1.4, 0.0))
    # Where no step was timed, the error alone is compared.
    assert cost(None, 0.05) == pytest.approx(cost(1.0, 0.05) - 1)


def test_where_nothing_helps():
    """Weights outweigh what is kept: no policy has a smaller peak than none."""
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), nn.LayerNorm(64))
    plan = mesa_train.plan(model, torch.randn(512, 64))
    assert plan.prediction.peak_bytes <= plan.plain.peak_bytes


class Large(nn.Module):
    """Runs out of memory wherever tensors are kept as they are."""

    def __init__(self):
        super().__init__()
        blocks = [(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)) for _ in range(3)]
        self.inner = nn.Sequential(*[layer for block in blocks for layer in block])

    def forward(self, x):
        mode = innermost()
        coded = mode is not None and mode.owner.policy.bits < 32 and not mode.owner.policy.overrides
        if not coded and not isinstance(x, FakeTensor):
            raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")
        return self.inner(x)


def test_where_plain_does_not_fit():
    planner = Planner.of(Large(), torch.randn(2048, 64))
    assert planner.profile.sensitivity.passes == 0
    plan = planner.plan(max_error=0.1)
    assert plan.prediction.time_ratio is None
    assert plan.prediction.peak_bytes < plan.plain.peak_bytes
    with pytest.raises(ValueError, match="needs a timed plain step"):
        planner.plan(max_time=1.1)


def test_nothing_to_choose():
    with pytest.raises(ValueError, match="nothing to choose"):
        mesa_train.plan(nn.Linear(4, 4), torch.randn(2, 4), 1000)


def test_progress_counts_four_steps():
    calls = []
    with torch.device("meta"):
        model, x = nn.Sequential(nn.Linear(64, 64), nn.GELU()), torch.empty(128, 64)
    Planner.of(model, x, progress=lambda *step: calls.append(step))
    steps = [step for step in calls if not step[0].startswith("gradient:")]
    assert steps == [("stashes", 0, 4), ("times", 1, 4), ("gradients", 2, 4), ("choosing", 3, 4)]


@pytest.mark.slow
def test_on_meta():
    with torch.device("meta"):
        model = timm.create_model("vit_large_patch16_224", depth=3)
        images = torch.empty(64, 3, 224, 224)
    planner = Planner.of(model, images, autocast=BF16)
    plan = planner.plan(int(0.7 * planner.plain.peak_bytes))
    assert plan.prediction.peak_bytes <= 0.7 * planner.plain.peak_bytes
    assert plan.prediction.step_s is None
    with pytest.raises(ValueError, match="needs a timed plain step"):
        planner.plan(max_time=1.1)


@pytest.mark.slow
def test_of_a_swin_the_least_peak_is_reached_and_nothing_below_it():
    """Its windows make the working set of the backward jump with the choices."""
    torch.manual_seed(0)
    model = timm.models.swin_transformer.SwinTransformer(
        img_size=56, window_size=7, embed_dim=32, depths=(1, 1), num_heads=(2, 4), num_classes=9
    )
    planner = Planner.of(model.train(), torch.randn(8, 3, 56, 56), autocast=BF16)
    with pytest.raises(OverBudget) as raised:
        planner.plan(planner.static + 1000)
    smallest = raised.value.smallest.prediction.peak_bytes
    for budget in (smallest, int(1.003 * smallest), int(1.05 * smallest)):
        assert planner.plan(budget).prediction.peak_bytes <= budget
    with pytest.raises(OverBudget):
        planner.plan(int(0.995 * smallest))


class Mixer(nn.Module):
    """A block of a model that is quickly planned for, and wide: with more arithmetic than traffic."""

    def __init__(self):
        super().__init__()
        self.norm, self.act = nn.LayerNorm(4096), nn.GELU()
        self.fc1, self.fc2 = nn.Linear(4096, 16384), nn.Linear(16384, 4096)

    def forward(self, x):
        return x + self.fc2(self.act(self.fc1(self.norm(x))))


def test_a_checkpointed_block_keeps_its_input_unless_that_is_moved():
    with torch.device("meta"):
        model, x = nn.Sequential(*[Mixer() for _ in range(3)]), torch.empty(1024, 4096)
    space = SearchSpace(model, x, None, default_loss)
    assert space.simulator.blocks == ["0", "1", "2"]
    for block in ("1", "2"):  # The user holds the input of the first.
        saved = {name: space.order.saved_by_block[block, name] for name in space.strategies}
        assert saved["checkpoint"] == saved["checkpoint of codes"] == 4 * x.numel()
        assert x.numel() < saved["checkpoint, input 8 bits"] < 1.1 * x.numel()
        assert saved["checkpoint, input 8 bits, offloaded"] == 0


@pytest.fixture(scope="module")
def moving():
    """Without data a model is planned for as on a GPU. The planner, a budget, and its plan."""
    with torch.device("meta"):
        model = nn.Sequential(*[Mixer() for _ in range(6)])
        planner = Planner.of(model, torch.empty(65536, 4096))
    budget = int(0.6 * planner.plain.peak_bytes)
    return planner, budget, planner.plan(budget)


@pytest.mark.slow
class TestMoving:
    """What is kept may wait in CPU memory, on a GPU."""

    def test_a_budget_is_met_by_moving_and_foretold_to_the_byte(self, moving):
        planner, budget, plan = moving
        prediction = plan.prediction
        assert prediction.peak_bytes <= budget
        assert prediction.offloaded_bytes > 0
        assert set(plan.choices.values()) & set(OFFLOADED_AS)
        model_and_inputs = planner.model.model, planner.model.inputs
        saved = footprint(*model_and_inputs, policy=plan.policy, loss=planner.model.loss)
        assert (prediction.saved_bytes, prediction.offloaded_bytes) == (
            saved.saved_bytes,
            saved.offloaded_bytes,
        )
        step = timeline(*model_and_inputs, policy=plan.policy)
        assert prediction.peak_bytes == planner.static + step.peak_bytes
        assert Policy.from_yaml(plan.policy.to_yaml()) == plan.policy

    @pytest.mark.parametrize("mode", ["checkpoint", "checkpoint of codes"])
    def test_a_checkpoints_input_may_be_moved(self, moving, mode):
        space = moving[0].model.space
        policy = space.policy(space.all(8, f"{mode}, input 8 bits, offloaded"))
        saved = space.footprint(policy)
        blocks = space.simulator.blocks
        assert saved.offloaded_bytes == sum(space.input_bytes(block, 8) for block in blocks) > 0
        assert (
            saved.saved_bytes
            < 0.01 * saved.offloaded_bytes
            + space.footprint(space.policy(space.all(8, mode))).saved_bytes
            - saved.offloaded_bytes
        )

    def test_main_memory_is_a_bound(self, moving):
        planner, budget, plan = moving
        host_link, budget_bytes = planner.host_link, plan.prediction.offloaded_bytes // 2
        try:
            planner.host_link = host_link._replace(capacity=budget_bytes)
            tight = planner.plan(budget).prediction
        finally:
            planner.host_link = host_link
        assert 0 <= tight.offloaded_bytes <= budget_bytes
        assert tight.peak_bytes <= budget

    def test_the_bus_is_filled_and_hardly_waited_for(self, moving):
        """Moving costs nothing while the link keeps up, so that much is offloaded, and not much more."""
        planner, _, plan = moving
        copy_s = plan.prediction.offloaded_bytes / planner.host_link.bytes_per_s
        assert 0.5 * planner.host_link.forward_s < copy_s < 1.2 * planner.host_link.forward_s
        assert planner.host_link.forward_s == pytest.approx(planner.profile.step_s / 3)

    def test_on_a_cpu_there_is_no_such_choice(self):
        model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
        planner = Planner.of(model, torch.randn(1024, 64))
        assert planner.host_link is None
        assert not any(
            set(candidate.choices()) & set(OFFLOADED_AS) for candidate in planner.profile.candidates
        )

    def test_main_memory_is_bytes(self):
        with pytest.raises(
            ValueError, match="cpu_memory must be bytes above 0 or text such as '8GiB', got 0"
        ):
            mesa_train.plan(nn.Linear(4, 4), torch.randn(2, 4), cpu_memory=0)


class TestCosts:
    def test_measured_once(self, tmp_path):
        path = tmp_path / "deep" / "timings.json"
        timings = OpTimings(torch.device("cpu"), BF16, path)
        first = timings.code(64, 128, 8), timings.matmul(64, 128, 32)
        assert all(seconds > 0 for seconds in first)
        repeated = OpTimings(torch.device("cpu"), BF16, path)
        assert (repeated.code(64, 128, 8), repeated.matmul(64, 128, 32)) == first
        (existing,) = json.loads(path.read_text()).values()
        assert set(existing) == {"code 64x128 8", "matmul 64x128x32"}
        assert repeated.code(8192, 128, 8) == 2 * repeated.code(4096, 128, 8)

    def test_a_broken_file_is_measured_anew(self, tmp_path):
        path = tmp_path / "timings.json"
        path.write_text("{")
        assert OpTimings(torch.device("cpu"), BF16, path).code(64, 128, 8) > 0
        assert json.loads(path.read_text())

    def test_of_a_typical_gpu(self, tmp_path):
        timings = OpTimings(torch.device("meta"), BF16, tmp_path / "none.json")
        # An A100's: 1.3 TB/s, of two bytes read, a code written and read, and two bytes written; 200
        # Tflop/s, of a product and a sum each; 25 GB/s of the host_link.
        assert timings.code(100, 1000, 8) == pytest.approx(1e5 * (2 + 1 + 1 + 2) / 1.3e12)
        assert timings.code(100, 1000, 4) == pytest.approx(1e5 * (2 + 0.5 + 0.5 + 2) / 1.3e12)
        assert timings.matmul(10, 20, 30) == pytest.approx(2 * 6000 / 2e14)
        assert timings.flops(5000, (10, 20, 30)) == pytest.approx(5000 / 2e14)
        assert timings.host_link() == 2.5e10
        assert timings.code(1000, 1000, 8) < timings.matmul(1000, 10_000, 10_000)
        assert not (tmp_path / "none.json").exists()


@pytest.mark.slow
def test_two_inputs_by_name():
    class Twins(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(32, 128), nn.Linear(16, 128)
            layers = [layer for _ in range(5) for layer in (nn.GELU(), nn.Linear(128, 128))]
            self.deep, self.out = nn.Sequential(*layers), nn.Linear(128, 4)

        def forward(self, left, right):
            return self.out(self.deep(self.left(left) + self.right(right)))

    inputs = {"left": torch.randn(8000, 32), "right": torch.randn(8000, 16)}
    model = Twins()
    smallest = mesa_train.plan(model, inputs)
    assert smallest.prediction.saved_bytes < smallest.plain.saved_bytes
    assert {kind for kind, *_ in smallest.summary()} >= {"activation.input"}
    assert dataclasses.asdict(smallest.prediction) == smallest.prediction.to_dict()
