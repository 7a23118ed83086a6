"""Gradients of a step of MoCo v3 by way, against those of the whole batch in float64.

A small ViT and the heads, with a batch of random images. The reference is the authors' step (both
views' forwards, then one backward) in float64. Every other row is in float32. Plain accumulation
and gradient caching at the queries cut the batch, so their batch norms and negatives differ.

    python scripts/bench/moco_gradients.py
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import timm
import torch
import typer
from torch import Tensor

import mesa_train
from mesa_train.models.moco import MoCo, backward_by_view, moco_loss
from mesa_train.utils import records

RESULTS = Path(__file__).resolve().parents[2] / "docs/results/moco_gradients.jsonl"
NAME, SIDE, MOMENTUM = "moco_vit_tiny", 28, 0.9
Step = Callable[[MoCo, Tensor, Tensor, int], Tensor]
Gradients = dict[str, Tensor]


def joint(model: MoCo, x1: Tensor, x2: Tensor, chunk: int) -> Tensor:  # noqa: ARG001
    """The authors' step."""
    loss: Tensor = model(x1, x2, MOMENTUM)
    loss.backward()
    return loss.detach()


def by_view(model: MoCo, x1: Tensor, x2: Tensor, chunk: int) -> Tensor:  # noqa: ARG001
    """One view's backward before the other's forward."""
    return backward_by_view(model, x1, x2, MOMENTUM)


def chunks(model: MoCo, x1: Tensor, x2: Tensor, chunk: int) -> Tensor:
    """The trunk in chunks, the heads on the whole batch."""
    return backward_by_view(model, x1, x2, MOMENTUM, chunk=chunk)


def checkpoint(model: MoCo, x1: Tensor, x2: Tensor, chunk: int) -> Tensor:
    """By view, with timm's activation checkpointing of the blocks."""
    model.base_encoder.set_grad_checkpointing(True)  # type: ignore[operator]
    return by_view(model, x1, x2, chunk)


def of_preset(name: str) -> Step:
    """By view under a preset of mesa_train."""

    def step(model: MoCo, x1: Tensor, x2: Tensor, chunk: int) -> Tensor:
        return by_view(mesa_train.wrap(model, name), x1, x2, chunk)

    return step


def accumulation(model: MoCo, x1: Tensor, x2: Tensor, chunk: int) -> Tensor:
    """The mean of the steps of chunks: each has its own negatives and statistics."""
    total = x1.new_zeros(())
    for part1, part2 in zip(x1.split(chunk), x2.split(chunk), strict=True):
        share = len(part1) / len(x1)
        loss = model(part1, part2, MOMENTUM) * share
        loss.backward()
        total += loss.detach()
    return total


def caching_at_the_queries(model: MoCo, x1: Tensor, x2: Tensor, chunk: int) -> Tensor:
    """Gradient caching of the whole network: each chunk has its own statistics in the heads."""
    model.update_momentum(MOMENTUM)
    k1, k2 = model.key(x1), model.key(x2)
    total = x1.new_zeros(())
    for x, k in ((x1, k2), (x2, k1)):
        with torch.no_grad():
            q = torch.cat([model.query(part) for part in x.split(chunk)])
        q.requires_grad_()
        loss = moco_loss(q, k, model.temperature)
        loss.backward()
        assert q.grad is not None
        for part, grad in zip(x.split(chunk), q.grad.split(chunk), strict=True):
            model.query(part).backward(grad)
        total += loss.detach()
    return total


WAYS: dict[str, Step] = {
    "joint": joint,
    "by view": by_view,
    "by view, chunks": chunks,
    "by view, checkpointing": checkpoint,
    "by view, mesa8": of_preset("mesa8"),
    "by view, mesa4": of_preset("mesa4"),
    "accumulation": accumulation,
    "caching at the queries": caching_at_the_queries,
}


def gradients(
    model: MoCo, step: Step, views: tuple[Tensor, Tensor], chunk: int
) -> tuple[float, Gradients]:
    """Take a step with a copy of the model. Returns (loss, gradients in float64)."""
    own = copy.deepcopy(model)
    loss = step(own, *views, chunk)
    found = {n: p.grad.double() for n, p in own.named_parameters() if p.grad is not None}
    return loss.item(), found


def distance(found: Gradients, wanted: Gradients) -> float:
    """Relative L2 distance of all gradients together."""
    if found.keys() != wanted.keys():
        raise ValueError("the two steps have gradients of different parameters")
    square = sum((found[n] - wanted[n]).square().sum().item() for n in wanted)
    return float((square / sum(g.square().sum().item() for g in wanted.values())) ** 0.5)


def measured(batch: int, chunk: int, seed: int) -> list[records.Row]:
    """A row for each way, without its origin."""
    torch.manual_seed(seed)
    model = MoCo(timm.create_model(NAME), dim=64, hidden=512).train()
    views = (torch.randn(batch, 3, SIDE, SIDE), torch.randn(batch, 3, SIDE, SIDE))
    # Views of one image resemble each other.
    views = (views[0], 0.7 * views[0] + 0.3 * views[1])
    whole = copy.deepcopy(model).double()
    loss, wanted = gradients(whole, joint, (views[0].double(), views[1].double()), chunk)
    same = gradients(model, joint, views, chunk)[1]
    rows = []
    for way, step in WAYS.items():
        own_loss, found = gradients(model, step, views, chunk)
        rows.append(
            {
                "model": NAME, "batch": batch, "chunk": chunk, "seed": seed, "way": way,
                "loss": own_loss, "reference_loss": loss,
                "gradient_error": distance(found, wanted),
                "same_as_joint": all(torch.equal(found[n], same[n]) for n in same),
            }
        )  # fmt: skip
    return rows


def main(
    batch: Annotated[int, typer.Option(min=2, help="Images.")] = 64,
    chunk: Annotated[int, typer.Option(min=2, help="Images of a chunk.")] = 16,
    seed: Annotated[int, typer.Option(help="Of weights and images.")] = 0,
    out: Annotated[Path, typer.Option(help="JSON lines to append to.")] = RESULTS,
) -> None:
    """Take a step each way and append a row."""
    for row in measured(batch, chunk, seed):
        records.append(out, {**row, **records.provenance()})
        print(f"{row['way']:24} loss {row['loss']:.4f}  error {row['gradient_error']:.2e}")


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(main)
    app()
