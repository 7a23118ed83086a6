"""Averaged weights of the ViT-22B recipes: the definition, checkpoints, and any sharding."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_vit22b_sharded import TINY, accelerate, settings

from mesa_train.training.vit22b import config as sharded_config
from mesa_train.training.vit22b import dry_run
from mesa_train.training.vit22b import loop as sharded_loop
from mesa_train.training.vit22b.averaging import AveragedWeights
from mesa_train.training.vit22b.checkpoint import export, load_export

DECAY = 0.6


def trained(out, **changes):
    given = {"policy": "plain", "ema": DECAY, **changes}
    config = sharded_config.load(TINY, settings(out, **given)[1::2])
    return sharded_loop.train(config, lambda _: None)


def read(folder):
    """All tensors of consolidated weights."""
    found = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        found |= load_file(path)
    return found


def test_the_average_of_a_few_weights():
    net = torch.nn.Linear(3, 2)
    net.bias.requires_grad_(False)
    average = AveragedWeights(net, 0.5)
    wanted = net.weight.detach().clone()
    for step in (1, 2, 30):
        with torch.no_grad():
            net.weight += step
        average.update(step)
        keep = min(0.5, (1 + step) / (10 + step))
        wanted = keep * wanted + (1 - keep) * net.weight.detach()
    torch.testing.assert_close(average.shards["weight"], wanted)
    assert list(average.shards) == ["weight"]
    found = dict(average.values(["weight", "bias"]))
    assert torch.equal(found["bias"], net.bias)


def test_a_resumed_run_has_the_same_average(tmp_path):
    whole = trained(tmp_path / "whole", save_every=3)
    cut = trained(tmp_path / "cut", resume=tmp_path / "whole/step-00000003")
    assert (tmp_path / "whole/step-00000003/averaged").is_dir()
    for name, value in whole.average.shards.items():
        assert torch.equal(value, cut.average.shards[name]), name
        assert not torch.equal(value, dict(whole.model.named_parameters())[name]), name
    export(tmp_path / "average", whole.model, values=whole.average.values)
    load_export(tmp_path / "average", cut.model)
    assert torch.equal(cut.model.head.weight, whole.average.shards["head.weight"])


def test_a_run_that_begins_to_average_starts_at_the_loaded_weights(tmp_path):
    trained(tmp_path / "without", ema=0, save_every=3)
    assert not (tmp_path / "without/step-00000003/averaged").exists()
    run = trained(tmp_path / "with", resume=tmp_path / "without/step-00000006")
    weights = dict(run.model.named_parameters())
    assert all(torch.equal(v, weights[n]) for n, v in run.average.shards.items())


def test_a_dry_run_counts_the_average():
    config = sharded_config.load(TINY, ["train.ema=0.999"])
    assert "average" in dry_run.report(config, 1, 10)
    assert "average" not in dry_run.report(sharded_config.load(TINY), 1, 10)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "changes"),
    [("fsdp2", {}), ("fsdp2", {"tensor_parallel": 2, "micro_batch": 32}), ("zero3", {})],
)
def test_two_processes_average_as_one_and_their_checkpoint_goes_on(tmp_path, engine, changes):
    """From their checkpoint they go on under FSDP2, or ZeRO-3 as it reads no other's weights."""
    single = trained(tmp_path / "single")
    wanted = dict(single.average.values(list(single.average.shards)))
    last = {n: p.detach() for n, p in single.model.named_parameters()}
    moved = sum(((wanted[n] - last[n]) ** 2).sum() for n in wanted).sqrt()

    def gap(folder):
        found = read(folder)
        assert set(found) >= set(wanted)
        return sum(((found[n] - wanted[n]) ** 2).sum() for n in wanted).sqrt() / moved

    out = tmp_path / engine
    given = settings(out, policy="plain", ema=DECAY, save_every=3, **changes)
    accelerate(engine, *given)
    # The average differs from the last weights by 1; another order of sums differs by far less.
    assert gap(out / "weights_averaged") < 0.02
    assert gap(out / "weights") > 0.5
    again = tmp_path / "again"
    rest = settings(again, policy="plain", ema=DECAY, resume=out / "step-00000003")
    accelerate(engine, *rest)
    assert gap(again / "weights_averaged") < 0.02
    rows = [json.loads(x) for x in (again / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [4, 5, 6]
