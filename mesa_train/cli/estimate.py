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
    gpus: Annotated[int, typer.Option(min=1, help="Number of GPUs of all machines.")] = 8,
    gpu_memory: Annotated[str, typer.Option(help="Memory of each GPU.")] = "24GiB",
    cpu_memory: Annotated[str, typer.Option(help="CPU memory of each machine.")] = "256GiB",
    nodes: Annotated[int, typer.Option(min=1, help="Number of machines.")] = 1,
    tensor_parallel: Annotated[
        int, typer.Option(min=1, help="Number of GPUs that share each layer, with FSDP2.")
    ] = 1,
    policies: Annotated[
        str | None, typer.Option(help="Comma-separated presets, checkpoint, plain; default: all.")
    ] = None,
    optimizer: Annotated[
        str,
        typer.Option(help="adamw or adamw8bit; or factored or lion in the backward of one GPU."),
    ] = "adamw",
    half: Annotated[
        bool, typer.Option("--half", help="Weights in bfloat16, without float32 copies.")
    ] = False,
    lora: Annotated[
        int, typer.Option(min=0, help="Rank of LoRA on a model frozen in NF4; 0: no LoRA.")
    ] = 0,
    all_setups: Annotated[
        bool, typer.Option("--all", help="Also show setups that do not fit.")
    ] = False,
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
            return loading(model, batch_size, image_size, "cpu", fake=True, warn=False)[0]

        first, _ = loading(model, batch_size, image_size, "cpu", fake=True)
        blocks = sorted({type(b).__name__ for b in find_blocks(first.model).values()})
        options: Any = {"batch": batch_size, "optimizer": optimizer, "lora": lora, "half": half}
        rows = []
        with quiet(), progress_bar() as progress:
            progress("counting", 0, len(SETUPS) * len(names))
            for row in estimates(make, cluster, policies=names, **options):
                rows.append(row)
                progress(f"{row.strategy}, {row.policy}", len(rows), len(SETUPS) * len(names))
        chosen = best(rows)
        configuration = "" if chosen is None else accelerate_config(chosen, cluster, blocks)
        if chosen is not None and out is not None:
            out.write_text(configuration)
        if as_json:
            results = {
                "rows": [row.to_dict() for row in rows],
                "chosen": chosen and chosen.to_dict(),
            }
            show_json({"model": model, "gpus": gpus, **results})
            return
        title = f"{model}  {gpus} GPUs of {gpu_memory}  {batch_size} images a GPU"
        fitting = {(row.strategy, row.offload) for row in rows if row.fits or all_setups}
        _show(title, [row for row in rows if (row.strategy, row.offload) in fitting])
        if chosen is None:
            show(_instead(rows, batch_size))
            return
        path = str(out) if out is not None else "accelerate.yaml"
        typer.echo(
            f"The simplest setup that fits: {chosen.strategy} with {chosen.policy}. {path}:\n"
        )
        typer.echo(configuration)
        typer.echo(command(chosen, model, path, gpus, side_of(first.inputs)))


def _show(title: str, rows: list[Any]) -> None:
    """Print the tables of the estimates."""
    from mesa_train.estimate.estimator import RESERVE
    from mesa_train.report import terminal
    from mesa_train.utils.formatting import format_gib

    reserve = format_gib(RESERVE)
    show(title, *(terminal.estimates(rows) if rows else []))
    show(f"{reserve} GiB of each GPU are reserved for CUDA, NCCL and the allocator.")


def _instead(rows: list[Any], batch_size: int) -> str:
    """A line with a setup that fits fewer images, or with the advice to use more GPUs."""
    largest = max(rows, key=lambda row: row.largest_batch, default=None)
    if largest is None or not largest.largest_batch:
        return "one image a GPU does not fit; use more GPUs or larger GPUs"
    return (
        f"{batch_size} images a GPU do not fit; {largest.strategy} with {largest.policy} fits "
        f"{largest.largest_batch}"
    )
