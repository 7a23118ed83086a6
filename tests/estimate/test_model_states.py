"""Model states by arithmetic: DeepSpeed's own estimates where it has one, and bitsandbytes' states."""

import dataclasses
import itertools

import pytest
import timm
import torch

from mesa_train.estimate.estimator import parameters_of
from mesa_train.estimate.lora import nf4_bytes, with_lora
from mesa_train.estimate.model_states import Cluster, Parameters, states
from mesa_train.measure.optimizer_states import adamw_bytes

GIB = 2**30


def made(model):
    return parameters_of(model)


@pytest.fixture(scope="module")
def vit():
    with torch.device("meta"):
        return timm.create_model("vit_tiny_patch16_224")


@pytest.mark.parametrize(("per_node", "nodes"), [(1, 1), (4, 1), (8, 2)])
class TestAsDeepSpeed:
    """The same numbers, to the byte that rounding the parts separately may cost."""

    def test_zero2(self, vit, per_node, nodes):
        stage = pytest.importorskip("deepspeed.runtime.zero.stage_1_and_2")
        counts = made(vit)
        cluster = Cluster(per_node * nodes, 80 * GIB, 512 * GIB, nodes)
        for offload in (False, True):
            cpu, gpu = stage.estimate_zero2_model_states_mem_needs(
                counts.total, per_node, nodes, cpu_offload=offload
            )
            result = states("zero2", "cpu" if offload else "none", counts, cluster)
            assert result.gpu - counts.buffers_bytes == pytest.approx(gpu, abs=4)
            assert result.cpu == cpu

    def test_zero3(self, vit, per_node, nodes):
        stage = pytest.importorskip("deepspeed.runtime.zero.stage3")
        counts = made(vit)
        cluster = Cluster(per_node * nodes, 80 * GIB, 512 * GIB, nodes)
        for offload in ("none", "optimizer", "cpu"):
            cpu, gpu, largest = stage.estimate_zero3_model_states_mem_needs(
                counts.total,
                counts.largest,
                per_node,
                nodes,
                cpu_offload=offload != "none",
                cpu_offload_params=offload == "cpu",
            )
            result = states("zero3", offload, counts, cluster)
            assert result.gathered == largest
            assert result.gpu - counts.buffers_bytes == pytest.approx(gpu, abs=4)
            assert result.cpu == cpu

    def test_counts(self, per_node, nodes):
        stage = pytest.importorskip("deepspeed.runtime.zero.stage3")
        model = timm.create_model("vit_tiny_patch16_224", depth=2)
        counts = made(model)
        assert (counts.total, counts.largest) == stage.model_to_params(model)


class TestStates:
    own = Parameters(
        trained=1000, frozen=0, largest=100, block=200, frozen_bytes=0, moments_bytes=8000
    )

    def test_ddp_on_one_gpu_is_plain_training(self):
        result = states("ddp", "none", self.own, Cluster(1, GIB, GIB))
        assert (result.weights, result.gradients, result.optimizer) == (4000, 4000, 8000)

    def test_fsdp2_spreads_everything(self):
        one, eight = (states("fsdp2", "none", self.own, Cluster(n, GIB, GIB)) for n in (1, 8))
        assert one.gpu - one.gathered == 16000
        assert eight.gpu - eight.gathered == 2000
        assert one.gathered == eight.gathered == 1200
        split = states("fsdp2", "none", self.own, Cluster(8, GIB, GIB, tensor_parallel=4))
        assert split.gathered == 300

    def test_offload_empties_the_gpu(self):
        cluster = Cluster(4, GIB, GIB)
        for strategy in ("zero3", "fsdp2"):
            result = states(strategy, "cpu", self.own, cluster)
            assert result.gpu == result.gathered
            assert result.cpu >= 16000
        nvme = states("zero3", "nvme", self.own, cluster)
        assert nvme.disk == states("zero3", "cpu", self.own, cluster).cpu
        assert nvme.cpu < nvme.disk

    def test_each_stage_takes_less(self):
        cluster = Cluster(8, GIB, GIB)
        sizes = [states(s, "none", self.own, cluster).gpu for s in ("ddp", "zero1", "zero2")]
        assert sizes == sorted(sizes, reverse=True)
        assert len(set(sizes)) == 3

    def test_zero1_keeps_whole_gradients_and_spreads_what_is_float32(self):
        result = states("zero1", "none", self.own, Cluster(4, GIB, GIB))
        # 2 bytes an element, 2 and a fourth of 4, a fourth of 4 and 8.
        assert (result.weights, result.gradients, result.optimizer) == (2000, 3000, 3000)

    def test_eight_bit_moments(self):
        less = dataclasses.replace(self.own, moments_bytes=2000)
        for strategy, ranks in itertools.product(
            ("ddp", "zero1", "zero2", "zero3", "fsdp2"), (1, 4)
        ):
            float32, small = (
                states(strategy, "none", counts, Cluster(ranks, GIB, GIB))
                for counts in (self.own, less)
            )
            share = 1 if strategy == "ddp" else ranks
            assert float32.gpu - small.gpu == pytest.approx(6000 / share, abs=3)

    def test_weights_in_half_precision_alone(self):
        """Weights, gradients, moments: 2 + 2 bytes and what the optimizer has, spread as before."""
        half = dataclasses.replace(self.own, half=True, moments_bytes=2000)
        for strategy, ranks, expected in (
            ("ddp", 1, (2000, 2000, 2000)),
            ("zero1", 4, (2000, 2000, 500)),
            ("zero2", 4, (2000, 500, 500)),
            ("zero3", 4, (500, 500, 500)),
            ("fsdp2", 4, (500, 500, 500)),
        ):
            result = states(strategy, "none", half, Cluster(ranks, GIB, GIB))
            assert (result.weights, result.gradients, result.optimizer) == expected, strategy
        assert states("zero3", "cpu", half, Cluster(1, GIB, GIB)).cpu == 6000 * 1.5

    def test_one_card(self):
        counts = dataclasses.replace(self.own, moments_bytes=1030, tensor=60)
        one = Cluster(1, GIB, GIB)
        stepped = states("in_backward", "none", counts, one)
        assert (stepped.weights, stepped.optimizer) == (2000, 1030)
        assert stepped.gradients == 20 * 60  # float32 rows of the largest parameter's update
        assert states("frozen", "none", counts, one).gpu == 2000
        with pytest.raises(ValueError, match="runs on one GPU, got gpus=2"):
            states("in_backward", "none", counts, Cluster(2, GIB, GIB))

    @pytest.mark.parametrize(
        ("strategy", "offload", "message"),
        [
            ("zero4", "none", "strategy must be one of"),
            ("zero3", "disk", "offload must be one of"),
            ("zero2", "nvme", "only zero3 offloads to NVMe"),
            ("fsdp2", "optimizer", "only zero3 offloads the optimizer without"),
            ("in_backward", "cpu", "nothing to offload"),
            ("ddp", "cpu", "nothing to offload"),
        ],
    )
    def test_bad_input(self, strategy, offload, message):
        with pytest.raises(ValueError, match=message):
            states(strategy, offload, self.own, Cluster(1, GIB, GIB))

    def test_bad_cluster(self):
        with pytest.raises(ValueError, match="must be a multiple of nodes"):
            Cluster(3, GIB, GIB, nodes=2)
        with pytest.raises(ValueError, match="a multiple of tensor_parallel=3"):
            Cluster(8, GIB, GIB, tensor_parallel=3)
        with pytest.raises(ValueError, match="gpus must be at least 1"):
            Cluster(0, GIB, GIB)


@pytest.mark.parametrize("elements", [100, 4096, 10_000])
def test_moments_as_the_optimizers_keep_them(elements):
    parameter = torch.nn.Parameter(torch.zeros(elements))
    parameter.grad = torch.ones(elements)
    bitsandbytes = pytest.importorskip("bitsandbytes")
    for optimizer, eight in (
        (torch.optim.AdamW([parameter], fused=True), False),
        (bitsandbytes.optim.AdamW8bit([parameter]), True),
    ):
        optimizer.step()
        saved = [
            value
            for name, value in optimizer.state[parameter].items()
            if isinstance(value, torch.Tensor) and not name.startswith("qmap")
        ]
        assert sum(t.nbytes for t in saved) == adamw_bytes(elements, 4, eight)


def test_nf4_bytes():
    """4 bits, an 8-bit scale for 64 elements, a float32 one for 256 scales."""
    assert nf4_bytes(64 * 256) == 64 * 256 // 2 + 256 + 4


def test_lora_trains_its_own_and_the_head(vit):
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224", depth=2)
    linears = [m for m in model.modules() if type(m) is torch.nn.Linear][:-1]
    float32 = sum(p.numel() for p in model.parameters())
    size = with_lora(model, 4)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora" in name or name.startswith("head") for name in trained)
    assert sum("lora_a" in name for name in trained) == len(linears) == 8
    coded = sum(m.weight.numel() for m in linears)
    head = sum(p.numel() for p in model.head.parameters())
    assert size == 2 * (float32 - head - coded) + sum(nf4_bytes(m.weight.numel()) for m in linears)
    with pytest.raises(ValueError, match="at least 1"):
        with_lora(model, 0)
