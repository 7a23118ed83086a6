"""Text tower, tokenizer and the contrastive loss of LiT (arXiv 2111.07991).

The text tower is open_clip's transformer without a causal mask. Its last Linear maps to the width of
the image tower, which has no projection. Texts are cleaned, then cut into the tokens of CLIP's
vocabulary, which comes with open_clip.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mesa_train.training.evaluation.text_alignment import canonicalize

from .config import LossConfig, TextConfig

VOCABULARY = 49408
EPS = 1e-8


def tokenizer(context: int) -> Any:
    """The function from texts to token numbers (N, context)."""
    cut = _open_clip("tokenizer").SimpleTokenizer(context_length=context)
    return lambda texts: cut([canonicalize(text) for text in texts])


def text_tower(config: TextConfig, width: int) -> nn.Module:
    """The text tower, from token numbers (N, context) to (N, width), with random weights."""
    return _open_clip("transformer").TextTransformer(
        context_length=config.context,
        vocab_size=VOCABULARY,
        width=config.width,
        heads=config.heads,
        layers=config.layers,
        output_dim=width,
        no_causal_mask=True,
    )


def _open_clip(part: str) -> Any:
    """A module of open_clip. ImportError with the remedy if it is missing."""
    import importlib

    try:
        return importlib.import_module(f"open_clip.{part}")
    except ImportError as error:
        raise ImportError(
            "the text tower needs open_clip; pip install 'mesa_train[lit]'"
        ) from error


class TwoTowers(nn.Module):
    """The trained modules: text tower, temperature, bias, and the image tower unless it is locked.

    Args:
        text: the text tower.
        image: the image tower; None if it is locked.
        loss: the section `loss`.
        embed: from pixels to embeddings (N, width) by the image tower; default: `image` itself.
    """

    def __init__(
        self,
        text: nn.Module,
        image: nn.Module | None,
        loss: LossConfig,
        embed: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.text, self.image = text, image
        # A function, so that the image tower is no submodule twice.
        self.embed = embed or (None if image is None else image.__call__)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(loss.temperature)))
        self.bias = nn.Parameter(torch.tensor(loss.bias)) if loss.name == "sigmoid" else None

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        """The loss of this process's pairs.

        Args:
            images: (N, width), rows of length 1, if the image tower is locked; else pixels.
            tokens: (N, context).
        """
        if self.image is not None:
            assert self.embed is not None
            images = unit(self.embed(images).float())
        texts = self.texts(tokens)
        with torch.autocast(images.device.type, enabled=False):
            return self.loss(images, texts)

    def texts(self, tokens: Tensor) -> Tensor:
        """Embeddings (N, width) of length 1 in float32."""
        return unit(self.text(tokens).float())

    def loss(self, images: Tensor, texts: Tensor) -> Tensor:
        """The loss of this process's pairs against those of all processes.

        The mean over processes is the loss of the global batch, and the mean of the gradients is
        its gradient.

        Args:
            images: (N, width), rows of length 1, of this process.
            texts: (N, width), rows of length 1; text i belongs to image i.
        """
        all_images, all_texts = gathered(images), gathered(texts)
        first = _rank() * len(images)
        target = torch.arange(first, first + len(images), device=images.device)
        scale = self.log_temperature.exp()
        rows = images @ all_texts.T * scale
        if self.bias is not None:
            sign = 2 * F.one_hot(target, len(all_texts)).to(rows) - 1
            return -F.logsigmoid(sign * (rows + self.bias)).sum(1).mean()
        columns = texts @ all_images.T * scale
        return (F.cross_entropy(rows, target) + F.cross_entropy(columns, target)) / 2


def unit(x: Tensor) -> Tensor:
    """Rows of length 1."""
    return x / (x.norm(dim=-1, keepdim=True) + EPS)


def gathered(x: Tensor) -> Tensor:
    """The rows of all processes in the order of their ranks, with a gradient to each."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    result: Tensor = _Gather.apply(x)
    return result


class _Gather(torch.autograd.Function):
    """Gather rows. The backward sums the gradients of all processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = len(x)
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        first = dist.get_rank() * ctx.rows
        return grad[first : first + ctx.rows]


def _rank() -> int:
    """The number of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def prompts_of(name: str) -> list[str]:
    """The prompts of a set, or of a file with a prompt in each line; {} stands for the name.

    "openai80" are CLIP's 80, "clip_paper" those and the bare name, "simple" CLIP's 7, "clip_best"
    those and the bare name, "name" the bare name.
    """
    from pathlib import Path

    from mesa_train.training.config_schema import ConfigError

    from .config import PROMPTS

    if name not in PROMPTS:
        lines = [line.strip() for line in Path(name).read_text(encoding="utf-8").splitlines()]
        lines = [line for line in lines if line]
        wrong = next((line for line in lines if line.count("{}") != 1), None)
        if not lines or wrong is not None:
            raise ConfigError(f"data.prompts: {name} needs one {{}} in each line, got {wrong!r}")
        return lines
    found = _open_clip("zero_shot_metadata")
    many, few = found.OPENAI_IMAGENET_TEMPLATES, found.SIMPLE_IMAGENET_TEMPLATES
    sets: dict[str, Sequence[Any]] = {
        "openai80": many, "clip_paper": [*many, "{}"], "simple": few, "clip_best": [*few, "{}"],
        "name": ["{}"],
    }  # fmt: skip
    return [prompt if isinstance(prompt, str) else prompt("{}") for prompt in sets[name]]


def imagenet_names() -> list[str]:
    """CLIP's names of ImageNet's 1,000 classes."""
    return list(_open_clip("zero_shot_metadata").IMAGENET_CLASSNAMES)
