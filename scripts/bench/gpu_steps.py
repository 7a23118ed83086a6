"""Sections of `gpu_first_run.py` that measure: steps, CUDA graphs, a profile, models, training."""

from __future__ import annotations

import contextlib
import operator
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mesa_train import Policy
from mesa_train.methods.checkpointing import NoBlocks
from mesa_train.methods.variants import Variant
from mesa_train.training.data.packaged import ImageSet, Split
from mesa_train.training.data.packaged import load as load_images

if TYPE_CHECKING:
    from gpu_worker import Bench

POLICIES = {"mesa8-fused": Policy(forward="fused")}
MAIN = ("vit_base_patch16_224", 128)
# Other models, with the batch size on a GPU.
MODELS = {
    "vit_small_patch16_224": 128,
    "vit_large_patch16_224": 64,
    "vit_tiny_patch16_224": 128,
    "swin_small_patch4_window7_224": 64,
    "litv2_s": 64,
}
# Smaller models of the same kinds, for a dry run.
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "vit_base_patch16_224": ("vit_tiny_patch16_224", {"img_size": 32, "depth": 1}),
    "vit_small_patch16_224": ("vit_tiny_patch16_224", {"img_size": 32, "depth": 1}),
    "vit_large_patch16_224": ("vit_tiny_patch16_224", {"img_size": 32, "depth": 2}),
    "vit_tiny_patch16_224": ("vit_tiny_patch16_224", {"img_size": 32, "depth": 1}),
    "swin_small_patch4_window7_224": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 64, "depths": (1, 1), "num_heads": (2, 4), "embed_dim": 32, "window_size": 4},
    ),
    "litv2_s": ("litv2_tiny", {"img_size": 32}),
}


class Training:
    """A model with a method, its optimizer and one batch on the device.

    Args:
        bench: the device and the sizes.
        name: a timm model, or a model of mesa_train.
        batch_size: on a GPU; 2 in a dry run.
        method: as for `scripts/bench/step.py`.
        graph: whether the step is for a CUDA graph.
    """

    def __init__(
        self, bench: Bench, name: str, batch_size: int, method: str, graph: bool = False
    ) -> None:
        import timm

        import mesa_train.models  # noqa: F401  timm knows them from here on

        options: dict[str, Any] = {}
        size = 224
        if bench.tiny:
            name, options = TINY[name]
            batch_size, size = 2, options["img_size"]
        torch.manual_seed(0)
        self.bench, self.name, self.batch_size, self.method = bench, name, batch_size, method
        model = timm.create_model(name, num_classes=1000, **options).to(bench.device).train()
        self.variant = Variant(model, POLICIES.get(method, method))
        self.images = torch.randn(batch_size, 3, size, size, device=bench.device)
        self.labels = torch.arange(batch_size, device=bench.device) % 1000
        # At learning rate 0 AdamW does all of its work and changes no weight.
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
        self.graph = graph

    def backward(self, module: nn.Module) -> Tensor:
        """Forward and backward."""
        # A graph must make its casts itself.
        with torch.autocast(self.bench.device, torch.bfloat16, cache_enabled=not self.graph):
            loss = F.cross_entropy(module(self.images).float(), self.labels)
        loss.backward()
        return loss.detach()

    def step(self, module: nn.Module) -> Tensor:
        """Forward, backward and AdamW."""
        loss = self.backward(module)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self.graph)
        return loss

    def timed(self, run: Callable[[], Any], steps: int) -> dict[str, Any]:
        """Times of whole steps, and of the host's part until the last launch; peak memory."""
        times_ms, host_ms = [], []
        if self.bench.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for _ in range(steps):
            self.bench.sync()
            begin = time.perf_counter()
            run()
            host_ms.append(1e3 * (time.perf_counter() - begin))
            self.bench.sync()
            times_ms.append(1e3 * (time.perf_counter() - begin))
        peak = torch.cuda.max_memory_allocated() if self.bench.device == "cuda" else None
        return {
            "step_ms": statistics.median(times_ms),
            "times_ms": [round(t, 3) for t in times_ms],
            "host_ms": statistics.median(host_ms),
            "peak_bytes": peak,
        }

    def row(self, **values: Any) -> None:
        """Write a row of this model and method."""
        self.bench.row(
            model=self.name, batch_size=self.batch_size, method=self.method, dtype="bf16", **values
        )


def warm_up(training: Training, module: nn.Module, steps: int = 3) -> dict[str, Any]:
    """A few steps: the first one's loss, and their seconds, with compilation."""
    begin = time.perf_counter()
    losses = [training.step(module) for _ in range(steps)]
    return {"loss": losses[0].item(), "warm_up_s": round(time.perf_counter() - begin, 2)}


def step(method: str, bench: Bench) -> None:
    """Steps of the main model with one method."""
    _measure(bench, *MAIN, method, 20)


def graph(method: str, bench: Bench) -> None:
    """Steps without the optimizer, as one CUDA graph. The host only replays it."""
    training = Training(bench, *MAIN, method, graph=True)
    with training.variant.active() as module:
        first = warm_up(training, module)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                training.backward(module)
        torch.cuda.current_stream().wait_stream(side)
        eager = training.timed(lambda: training.backward(module), 10)
        training.optimizer.zero_grad(set_to_none=False)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            loss = training.backward(module)
        replayed = training.timed(captured.replay, 20)
        same = loss.item() == first["loss"]
        training.row(
            graph=True, same_loss=same, without_graph_ms=eager["step_ms"], **first, **replayed
        )


def profile(bench: Bench) -> None:
    """The kernels of one step of plain and of mesa8, by their time."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    gpu = bench.device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    for method in ("plain", "mesa8"):
        training = Training(bench, *MAIN, method)
        with training.variant.active() as module:
            warm_up(training, module)
            with profiled(activities=activities) as profiler:
                training.step(module)
                bench.sync()
        by = "self_device_time_total" if gpu else "self_cpu_time_total"
        events = sorted(profiler.key_averages(), key=operator.attrgetter(by), reverse=True)
        kernels = [
            {
                "name": event.key[:100],
                "calls": event.count,
                "device_us": round(event.self_device_time_total, 1),
                "host_us": round(event.self_cpu_time_total, 1),
            }
            for event in events[:40]
        ]
        training.row(kernels=kernels)
        del training, module
        bench.free()


def model(name: str, bench: Bench) -> None:
    """Steps of another model: plain, mesa8, checkpoint."""
    for method in ("plain", "mesa8", "checkpoint"):
        try:
            _measure(bench, name, MODELS[name], method, 10)
        except NoBlocks as reason:
            bench.row(model=name, method=method, note=str(reason))
        bench.free()


def _measure(bench: Bench, name: str, batch_size: int, method: str, steps: int) -> None:
    """Write the row of one model and method."""
    training = Training(bench, name, batch_size, method)
    with training.variant.active() as module:
        first = warm_up(training, module)
        training.row(
            **first, **training.timed(lambda: training.step(module), steps_of(bench, steps))
        )


def compiled(method: str, bench: Bench) -> None:
    """Steps of the main model, compiled."""
    training = Training(bench, *MAIN, method)
    # A dry run has no need of a C++ compiler.
    backend = "aot_eager" if bench.tiny else "inductor"
    with training.variant.active() as module:
        module.compile(backend=backend, dynamic=False)
        first = warm_up(training, module)
        training.row(
            compiled=backend,
            **first,
            **training.timed(lambda: training.step(module), steps_of(bench, 15)),
        )


def steps_of(bench: Bench, steps: int) -> int:
    """The number of measured steps."""
    return 2 if bench.tiny else steps


def training(method: str, bench: Bench) -> None:
    """Train a small ViT from scratch, and write the held-out accuracy of every epoch."""
    from mesa_train.training import small_models
    from mesa_train.training.trainer import TrainConfig, Trainer, fit

    images = pictures(bench)
    config = TrainConfig(
        epochs=1 if bench.tiny else 12,
        batch_size=16 if bench.tiny else 64,
        autocast=None if bench.tiny else torch.bfloat16,
        device=bench.device,
    )
    built, images = small_models.build(small_models.SMALL_VIT, images, seed=0)
    variant = Variant(built, method)
    limit = time.time() + 60
    with variant.active() as module:
        trainer = Trainer(module, config, images.steps_per_epoch(config.batch_size))
        begin = time.time()
        for result in fit({method: trainer}, images, config):
            row = {"method": method, "data": images.name, "epochs": config.epochs}
            bench.row(**row, **result.row(), trained_s=round(time.time() - begin, 1))
            if time.time() > limit or (bench.left() < 5 and not bench.tiny):
                break


def pictures(bench: Bench) -> ImageSet:
    """Handwritten digits if a package has them, else drawn gratings."""
    for name in ("mnist5k", "digits") if not bench.tiny else ():
        with contextlib.suppress(ImportError):
            return load_images(name)
    return gratings(60 if bench.tiny else 5000)


def gratings(count: int) -> ImageSet:
    """Images (28x28) of 10 classes: noisy gratings in 5 directions and 2 widths.

    Phase, contrast and noise are drawn at random, from a seed.
    """
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 10
    angle = (labels % 5) * torch.pi / 5 + 0.1 * torch.randn(count, generator=generator)
    width = 4.0 + 3.0 * (labels // 5) + 0.4 * torch.randn(count, generator=generator)
    phase = 2 * torch.pi * torch.rand(count, generator=generator)
    contrast = 0.05 + 0.2 * torch.rand(count, generator=generator)
    y, x = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
    angle, width, phase, contrast = [t[:, None, None] for t in (angle, width, phase, contrast)]
    waves = torch.sin(2 * torch.pi * (x * angle.cos() + y * angle.sin()) / width + phase)
    noise = 0.4 * torch.randn(count, 28, 28, generator=generator)
    pixels = ((0.5 + contrast * waves + noise).clamp(0, 1) * 255).to(torch.uint8)[:, None]
    held_out = count // 5
    train = Split(pixels[held_out:], labels[held_out:])
    scaled = train.images.float() / 255
    return ImageSet(
        name="gratings",
        train=train,
        held_out=Split(pixels[:held_out], labels[:held_out]),
        num_classes=10,
        mean=scaled.mean().item(),
        std=scaled.std().item(),
    )
