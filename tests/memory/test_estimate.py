"""What fits: activations on a line through two batch sizes, setups from simple to slow."""

import itertools
from pathlib import Path

import pytest
import timm
import torch
import yaml

from mesa_train.memory.estimate import activations_of, best, estimates
from mesa_train.memory.launch import accelerate_config, command
from mesa_train.memory.load import Loaded
from mesa_train.memory.sharding import Cluster
from mesa_train.memory.timeline import timeline
from mesa_train.training import config

GIB = 2**30
REPOSITORY = Path(__file__).resolve().parents[2]


def make(batch=4):
    """A ViT of two blocks: 1.3 million parameters."""
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2)
        images = torch.empty(batch, 3, 64, 64)
    return Loaded("vit", model.train(), images)


def test_activations_lie_on_their_line():
    found = activations_of(make(8), 8, "mesa8", autocast=True)
    model = make().model
    for batch in (8, 16, 64):
        images = torch.empty(batch, 3, 64, 64, device="meta")
        step = timeline(model, images, policy="mesa8", autocast=torch.bfloat16)
        # The statistics of a group of heads come in whole chunks: a step, not a line.
        assert found.bytes(batch) == pytest.approx(step.working_bytes, rel=0.05)
    assert found.largest(found.bytes(100)) in (99, 100)


def test_policies_and_lora_take_less():
    plain, mesa = (activations_of(make(), 4, p, autocast=False) for p in ("plain", "mesa8"))
    assert plain.per_image > 1.3 * mesa.per_image
    lora = activations_of(make(), 4, "mesa8", autocast=False, lora=4)
    assert lora.kept_per_image < mesa.kept_per_image


def test_the_simplest_that_fits():
    # 16 bytes a parameter and a gradient bucket are 25 MB on one GPU.
    def ask(memory, **more):
        cluster = Cluster(8, memory, 64 * GIB)
        return list(
            estimates(make, cluster, batch=4, policies=["plain", "mesa8"], reserve=0, **more)
        )

    roomy, narrow, none = ask(GIB), ask(14 << 20), ask(1 << 20)
    assert (best(roomy).strategy, best(roomy).policy) == ("ddp", "plain")
    assert best(narrow).strategy.startswith(("zero", "fsdp"))
    assert best(none) is None
    assert {e.reason for e in none} <= {"", "GPU memory", "main memory"}
    for e in roomy:
        assert e.gpu_bytes == e.states.gpu + e.activations
        assert e.largest_batch >= 4
    assert [e.strategy for e in roomy][:4] == ["ddp", "ddp", "zero1", "zero1"]


def test_main_memory_is_a_limit():
    cluster = Cluster(8, GIB, 1 << 20)
    found = list(estimates(make, cluster, batch=4, policies=["mesa8"], setups=[("zero3", "cpu")]))
    assert [(e.fits, e.reason, e.largest_batch) for e in found] == [(False, "main memory", 0)]


def test_unknown_optimizer():
    with pytest.raises(ValueError, match="optimizer must be one of"):
        next(estimates(make, Cluster(1, GIB, GIB), batch=4, optimizer="sgd"))


@pytest.mark.parametrize(
    ("setup", "tensor_parallel"),
    [(("ddp", "none"), 1), (("zero2", "cpu"), 1), (("zero3", "nvme"), 1), (("fsdp2", "none"), 2)],
)
def test_accelerate_takes_the_configuration(setup, tensor_parallel, tmp_path):
    arguments = pytest.importorskip("accelerate.commands.config.config_args")
    cluster = Cluster(8, 80 * GIB, 512 * GIB, tensor_parallel=tensor_parallel)
    (found,) = estimates(make, cluster, batch=4, policies=["mesa8"], setups=[setup])
    path = tmp_path / "accelerate.yaml"
    path.write_text(accelerate_config(found, cluster, ["Block"]))
    read = arguments.ClusterConfig.from_yaml_file(path)
    assert read.num_processes == 8
    fields = yaml.safe_load(path.read_text())
    if setup[0] == "fsdp2":
        assert fields["fsdp_config"]["fsdp_transformer_layer_cls_to_wrap"] == "Block"
    if setup[0].startswith("zero"):
        assert fields["deepspeed_config"]["zero_stage"] == int(setup[0][-1])
        assert fields["deepspeed_config"]["offload_optimizer_device"] == setup[1]


@pytest.mark.parametrize("policy", ["mesa8", "plain", "checkpoint"])
def test_the_recipe_takes_the_command(policy):
    (found,) = estimates(
        make, Cluster(8, GIB, 64 * GIB), batch=4, policies=[policy], setups=[("zero2", "none")]
    )
    words = command(found, "vit_tiny_patch16_224", "accelerate.yaml", 8).split()
    assert words[:4] == ["accelerate", "launch", "--config_file", "accelerate.yaml"]
    assert (REPOSITORY / words[4]).exists()
    changes = [change for flag, change in itertools.pairwise(words) if flag == "--set"]
    settings = config.load(REPOSITORY / words[words.index("--config") + 1], changes)
    assert settings.model.name == "vit_tiny_patch16_224"
    assert (settings.train.micro_batch, settings.train.global_batch) == (4, 32)
    assert settings.train.policy == ("mesa8" if policy == "mesa8" else "plain")
    assert settings.model.grad_checkpointing == (policy == "checkpoint")
    assert "litv2" not in command(found, "hf:vit", "accelerate.yaml", 8)
