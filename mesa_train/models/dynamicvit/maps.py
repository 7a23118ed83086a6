"""DynamicViT for maps (arXiv 2207.01580): positions of the third stage take a slow or a fast path.

Nothing is dropped. In eval mode each predictor scores every position anew, and a fixed number of
the best takes the slow path of the next blocks; the others take the fast path, one Linear. In train
mode both paths run at every position, as two streams s and f that decisions m mix:
z = m s + (1 - m) f. Both streams start from the map before the first predictor, and z is the map
after the last block of the stage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mesa_train.models.common.straight_through import gumbel_softmax

from . import predictor
from .base import DynamicClassifier, check_predictors
from .outputs import Pruned, TeacherOutput, TrainingOutput
from .predictor import KEEP

RATE_STEP = 0.2


def map_keep_rates(keep_rate: float, predictors: int) -> list[float]:
    """The share of slow positions after each predictor: keep_rate, and 0.2 less after each.

    Raises:
        ValueError: a share is not in (0, 1].
    """
    rates = [keep_rate - RATE_STEP * stage for stage in range(predictors)]
    if not 0 < keep_rate <= 1 or (rates and rates[-1] <= 0):
        least = RATE_STEP * max(predictors - 1, 0)
        raise ValueError(f"keep_rate must be above {least:.1f} and at most 1, got {keep_rate}")
    return rates


def by_position(
    x: Tensor, slow: Tensor, fast: Tensor, run_slow: Callable[..., Tensor], run_fast: Any
) -> Tensor:
    """Run two functions of tokens at two sets of positions.

    Args:
        x: tokens (B, N, C).
        slow, fast: positions (B, k) and (B, N - k), which are all positions together.
        run_slow, run_fast: from tokens (B, k, C) to tokens of the same shape.
    Returns:
        (B, N, C).
    """
    out = torch.zeros_like(x)
    for positions, run in ((slow, run_slow), (fast, run_fast)):
        rows = positions.unsqueeze(-1).expand(-1, -1, x.shape[2])
        out = out.scatter(1, rows, run(x.gather(1, rows)).to(out.dtype))
    return out


class SparseMapNet(DynamicClassifier):
    """Base of the ConvNeXt and the Swin model.

    A subclass defines `enter`, `leave`, `sparse_blocks` and `scorers`. A block of the sparse stage
    has `forward(x)`, `mixed(x, slow, fast)` for inference and `streams(s, f, m)` for training.

    Attributes:
        keep_rate: share of slow positions after the first predictor.
        predictors: the blocks of the third stage, from 0, that a predictor precedes.
        counts: slow positions after each predictor.
    """

    img_size: tuple[int, int]
    keep_rate: float
    predictors: tuple[int, ...]
    counts: list[int]
    grad_checkpointing = False

    def set_predictors(
        self, keep_rate: float, predictors: Sequence[int], depth: int, positions: int
    ) -> None:
        """Check and set the attributes.

        Args:
            keep_rate: share of slow positions after the first predictor.
            predictors: rising numbers of blocks.
            depth: blocks of the third stage.
            positions: of a map of the third stage.
        Raises:
            ValueError: names the argument that is out of range.
        """
        check_predictors(predictors, depth)
        self.keep_rate, self.predictors = keep_rate, tuple(predictors)
        self.counts = [
            int(positions * rate) for rate in map_keep_rates(keep_rate, len(self.predictors))
        ]

    @property
    def keep_rates(self) -> list[float]:
        """The share of slow positions after each predictor, for the ratio loss."""
        return map_keep_rates(self.keep_rate, len(self.predictors))

    def outer_flops(self) -> int:
        """Multiply-adds outside of the third stage's blocks and predictors, for one image."""
        raise NotImplementedError

    def flops(self) -> int:
        """Multiply-adds of the products of the inference for one image of `img_size`."""
        positions = (self.img_size[0] // 16) * (self.img_size[1] // 16)
        total, slow = self.outer_flops(), positions
        blocks: list[Any] = list(self.sparse_blocks)
        for index, block in enumerate(blocks):
            if index in self.predictors:
                stage = self.predictors.index(index)
                slow = self.counts[stage]
                scorer: Any = self.scorers[stage]
                total += predictor.flops(positions, scorer.dim)
            total += block.flops(positions, slow)
        return total

    def enter(self, images: Tensor) -> Tensor:
        """The map (B, H, W, C) before the third stage's blocks."""
        raise NotImplementedError

    def leave(self, x: Tensor) -> Tensor:
        """The features (B, H / 2, W / 2, num_features) from the map after the third stage."""
        raise NotImplementedError

    def normalized(self, features: Tensor) -> Tensor:
        """The normalised features of every position, which are distilled."""
        raise NotImplementedError

    @property
    def sparse_blocks(self) -> nn.ModuleList:
        """The blocks of the third stage."""
        raise NotImplementedError

    @property
    def scorers(self) -> nn.ModuleList:
        """The predictors."""
        raise NotImplementedError

    def prune(self, images: Tensor) -> Pruned:
        """Choose slow positions as in inference. `kept` has their numbers in the map, row by row."""
        x = self.enter(images)
        scores: list[Tensor] = []
        kept: list[Tensor] = []
        rest: Tensor | None = None
        blocks: list[Any] = list(self.sparse_blocks)
        for index, block in enumerate(blocks):
            if index in self.predictors:
                stage = self.predictors.index(index)
                score = self.scorers[stage](x.flatten(1, 2))[..., KEEP]
                order = score.argsort(dim=1, descending=True)
                count = self.counts[stage]
                scores.append(score)
                kept.append(order[:, :count].sort(dim=1).values)
                rest = order[:, count:].sort(dim=1).values
            x = self._run(block, x) if rest is None else block.mixed(x, kept[-1], rest)
        return Pruned(self.leave(x), tuple(scores), tuple(kept))

    def forward_train(
        self, images: Tensor, noise: Sequence[Tensor] | None = None
    ) -> TrainingOutput:
        """The forward of the training, with both streams at every position.

        Args:
            images: (B, in_chans, H, W).
            noise: Gumbel noise (B, N, 2) of each predictor; default: drawn.
        """
        x = self.enter(images)
        slow, fast, mask = x, x, torch.ones_like(x[..., :1])
        decisions = []
        blocks: list[Any] = list(self.sparse_blocks)
        for index, block in enumerate(blocks):
            if index in self.predictors:
                stage = self.predictors.index(index)
                scores = self.scorers[stage](mixed(slow, fast, mask).flatten(1, 2))
                drawn = gumbel_softmax(scores, None if noise is None else noise[stage])
                decisions.append(drawn[..., KEEP : KEEP + 1])
                mask = decisions[-1].unflatten(1, x.shape[1:3])
            if decisions:
                slow, fast = self._run(block.streams, slow, fast, mask)
            else:
                slow = fast = self._run(block, slow)
        features = self.leave(mixed(slow, fast, mask))
        tokens = self.normalized(features).flatten(1, 2)
        every = torch.ones_like(tokens[..., :1])
        return TrainingOutput(self.forward_head(features), tokens, every, tuple(decisions))

    def teach(self, images: Tensor) -> TeacherOutput:
        """The targets of the distillation. RuntimeError if the model has predictors."""
        if self.predictors:
            raise RuntimeError("a teacher has slow positions only: build it with predictors=()")
        features = self.forward_features(images)
        return TeacherOutput(self.forward_head(features), self.normalized(features).flatten(1, 2))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Turn activation checkpointing of the third stage's blocks on or off."""
        self.grad_checkpointing = enable

    def adapt_checkpoint(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A checkpoint's weights; a backbone alone gets this model's predictors and fast paths."""
        own = self.state_dict()
        new = {k: v for k, v in own.items() if "score_predictor" in k or "fast" in k}
        adapted = {
            k: own[k] if k in own and k.endswith(("_position_index", "attn_mask")) else v
            for k, v in weights.items()
        }
        return adapted if new.keys() & adapted.keys() else adapted | new

    def _run(self, block: Callable[..., Any], *inputs: Tensor) -> Any:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)


def mixed(slow: Tensor, fast: Tensor, mask: Tensor) -> Tensor:
    """mask * slow + (1 - mask) * fast."""
    return mask * slow + (1 - mask) * fast
