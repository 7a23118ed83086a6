"""Training of ViT-22B or a smaller model of its family, on one process or sharded over several.

    python recipes/vit22b/train.py recipes/vit22b/tiny.yaml
    accelerate launch --config_file recipes/vit22b/accelerate/fsdp2.yaml \\
        recipes/vit22b/train.py recipes/vit22b/tiny.yaml --set train.tensor_parallel=2

The script writes rows to OUT/metrics.jsonl, checkpoints to OUT/step-* and the final weights to
OUT/weights.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mesa_train.training.data import sources
from mesa_train.training.disk import append, last_good, peer_ended
from mesa_train.training.vit22b import config as sharded_config
from mesa_train.training.vit22b import dry_run as sharded_plan
from mesa_train.training.vit22b import loop as sharded_loop
from mesa_train.training.vit22b.checkpoint import CheckpointError, export
from mesa_train.training.vit22b.config import precision_of
from mesa_train.training.vit22b.stability import DivergenceError


def main(
    config: Annotated[Path, typer.Argument(help="A YAML file of this folder.")],
    changes: Annotated[list[str] | None, typer.Option("--set", help="section.key=value")] = None,
    weights: Annotated[bool, typer.Option(help="Write consolidated weights at the end.")] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would do and need; start nothing.")
    ] = False,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Processes that a dry run counts for.")
    ] = None,
) -> None:
    """Train as the file CONFIG specifies."""
    out: Path | None = None
    try:
        settings = sharded_config.load(config, changes or [])
        if dry_run:
            world = ranks or int(os.environ.get("WORLD_SIZE", "1"))
            classes = settings.model.classes or sources.load(settings.data, None).classes
            if os.environ.get("RANK", "0") == "0":
                print(sharded_plan.report(settings, world, classes))
            leave(0)
        out = Path(settings.train.out)
        metrics = out / "metrics.jsonl"
        out.mkdir(parents=True, exist_ok=True)

        def report(row: dict[str, Any]) -> None:
            append(metrics, row)
            rate = f"{row['images_per_s']:.1f} images/s"
            print(f"step {row['step']}: loss {row['loss']:.5f}, {rate}", flush=True)

        if os.environ.get("RANK", "0") == "0":
            print(precision_of(settings).line, flush=True)
        engine = sharded_loop.train(settings, report)
        if weights:
            export(out / "weights", engine.model)
            if engine.average is not None:
                average = engine.average
                export(out / "weights_averaged", engine.model, values=average.values)
        engine.close()
    except (
        sharded_config.ConfigError,
        CheckpointError,
        DivergenceError,
        sources.CorruptImage,
        ValueError,
        ImportError,
        OSError,
    ) as error:
        line = " ".join(str(error).split())
        if isinstance(error, OSError) and out is not None:
            line += f"; {last_good(out)}"
        # One process alone may fail to read or write a file. All processes meet any other mistake.
        if os.environ.get("RANK", "0") == "0" or isinstance(error, (sources.CorruptImage, OSError)):
            print(f"error: {line}", file=sys.stderr)
            sys.stderr.flush()
        leave(2)
    except RuntimeError as error:
        if not peer_ended(error):
            raise
        leave(2)
    leave(0)


def leave(code: int) -> None:
    """End this process at once, because gloo's threads may abort an orderly exit.

    All files are written by then.
    """
    sys.stdout.flush()
    if "RANK" in os.environ:
        os._exit(code)
    raise typer.Exit(code)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(main)
    app()
