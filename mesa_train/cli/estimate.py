"""`mesa-train estimate`: estimate the memory of sharded training on every GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .common import (
    BatchSize,
    ImageSize,
    Json,
    Model,
    loading,
    one_line_errors,
    progress_bar,
    quiet,
    show,
    show_json,
    writable_file,
)


def estimate(
    model: Model,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs in all.")] = 8,
    gpu_memory: Annotated[str, typer.Option(help="Memory of a GPU.")] = "24GiB",
    cpu_memory: Annotated[str, typer.Option(help="Main memory of a machine.")] = "256GiB",
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    tensor_parallel: Annotated[
        int, typer.Option(min=1, help="GPUs that share a layer, with FSDP2.")
    ] = 1,
    policies: Annotated[
        str | None, typer.Option(help="Comma-separated presets, checkpoint, plain; default: all.")
    ] = None,
    optimizer: Annotated[
        str,
        typer.Option(help="adamw, adamw8bit; factored or lion step in the backward, on one GPU."),
    ] = "adamw",
    half: Annotated[
        bool, typer.Option("--half", help="Weights in bfloat16, without float32 copies.")
    ] = False,
    lora: Annotated[
        int, typer.Option(min=0, help="Rank of LoRA on a model frozen in NF4; 0: train all.")
    ] = 0,
    every: Annotated[bool, typer.Option("--all", help="Also setups that no policy fits.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Write accelerate's configuration to this YAML file.")
    ] = None,
    batch_size: BatchSize = 32,
    image_size: ImageSize = None,
    as_json: Json = False,
) -> None:
    """Estimate the memory of sharded training on every GPU.

    Counts weights, gradients, optimizer states and activations with DDP, ZeRO, FSDP2, offload and
    LoRA. Shows which setups fit, and how to start the simplest of them.
    """
    with one_line_errors():
        from mesa_train.estimate.estimator import POLICIES, SETUPS, best, estimates
        from mesa_train.estimate.launch import accelerate_config, command
        from mesa_train.estimate.model_states import Cluster
        from mesa_train.loading.inputs import side_of
        from mesa_train.methods.apply import check_method
        from mesa_train.methods.checkpointing import find_blocks
        from mesa_train.utils.formatting import parse_bytes

        names = list(POLICIES) if policies is None else [p.strip() for p in policies.split(",")]
        for name in names:
            check_method(name)
        memory = parse_bytes(gpu_memory, "--gpu-memory"), parse_bytes(cpu_memory, "--cpu-memory")
        cluster = Cluster(gpus, *memory, nodes, tensor_parallel)
        writable_file(out, "--out", ".yaml .yml")

        def make() -> Any:
            return loading(model, batch_size, image_size, "cpu", fake=True, tell=False)[0]

        first, _ = loading(model, batch_size, image_size, "cpu", fake=True)
        blocks = sorted({type(b).__name__ for b in find_blocks(first.model).values()})
        asked: Any = {"batch": batch_size, "optimizer": optimizer, "lora": lora, "half": half}
        found = []
        with quiet(), progress_bar() as progress:
            progress("counting", 0, len(SETUPS) * len(names))
            for row in estimates(make, cluster, policies=names, **asked):
                found.append(row)
                progress(f"{row.strategy}, {row.policy}", len(found), len(SETUPS) * len(names))
        chosen = best(found)
        configuration = "" if chosen is None else accelerate_config(chosen, cluster, blocks)
        if chosen is not None and out is not None:
            out.write_text(configuration)
        if as_json:
            answer = {"rows": [e.to_dict() for e in found], "chosen": chosen and chosen.to_dict()}
            show_json({"model": model, "gpus": gpus, **answer})
            return
        title = f"{model}  {gpus} GPUs of {gpu_memory}  {batch_size} images a GPU"
        fitting = {(e.strategy, e.offload) for e in found if e.fits or every}
        _show(title, [e for e in found if (e.strategy, e.offload) in fitting])
        if chosen is None:
            show(_instead(found, batch_size))
            return
        path = str(out) if out is not None else "accelerate.yaml"
        typer.echo(f"The simplest that fits: {chosen.strategy} with {chosen.policy}. {path}:\n")
        typer.echo(configuration)
        typer.echo(command(chosen, model, path, gpus, side_of(first.inputs)))


def _show(title: str, rows: list[Any]) -> None:
    """Print the tables of the estimates."""
    from mesa_train.estimate.estimator import RESERVE
    from mesa_train.report import terminal
    from mesa_train.utils.formatting import format_gib

    reserve = format_gib(RESERVE)
    show(title, *(terminal.estimates(rows) if rows else []))
    show(f"{reserve} GiB of each GPU are left for CUDA, NCCL and the allocator.")


def _instead(found: list[Any], batch_size: int) -> str:
    """A line with a setup that fits fewer images, or with the advice to use more GPUs."""
    most = max(found, key=lambda e: e.largest_batch, default=None)
    if most is None or not most.largest_batch:
        return "not even one image a GPU fits; more or larger GPUs are needed"
    return (
        f"{batch_size} images a GPU do not fit; {most.strategy} with {most.policy} takes "
        f"{most.largest_batch}"
    )
