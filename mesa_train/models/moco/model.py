"""MoCo v3: an encoder, its momentum copy, a predictor, and the symmetrised contrastive loss.

    q = predictor(projector(trunk(x))),  k = momentum projector(momentum trunk(x))
    loss = l(q1, k2) + l(q2, k1)

The keys of all ranks are the negatives; there is no queue. Each view is a forward of its own, so
batch norm has the statistics of one view. The momentum copy stays in train mode and keeps its own
running statistics.

The keys of the state dict are those of the official checkpoints: `base_encoder.`,
`momentum_encoder.` and `predictor.`, with the projector in place of the classifier.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


def mlp(sizes: list[int], last_norm: bool = True) -> nn.Sequential:
    """Linear layers without bias, each but the last with batch norm and ReLU.

    Args:
        sizes: widths, from the input to the output.
        last_norm: put a batch norm without weights at the end; default true.
    """
    layers: list[nn.Module] = []
    for i, (before, after) in enumerate(itertools.pairwise(sizes)):
        layers.append(nn.Linear(before, after, bias=False))
        if i < len(sizes) - 2:
            layers += [nn.BatchNorm1d(after), nn.ReLU(inplace=True)]
        elif last_norm:
            layers.append(nn.BatchNorm1d(after, affine=False))
    return nn.Sequential(*layers)


@torch.no_grad()
def gather_keys(keys: Tensor) -> Tensor:
    """The keys (W * N, D) of all W ranks, in the order of ranks, without a gradient.

    All ranks need the same N. Without a process group these are the keys themselves.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return keys
    gathered = [torch.empty_like(keys) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, keys.contiguous())
    return torch.cat(gathered)


def moco_loss(q: Tensor, k: Tensor, temperature: float = 0.2) -> Tensor:
    """One side of the loss: 2 T times the cross-entropy of finding the own image's key.

    The factor 2 T makes the learning rate independent of T. At chance the loss of both sides is
    4 T log(W * N), not log(W * N).

    Args:
        q: (N, D) queries of this rank.
        k: (N, D) keys of this rank's other view. The keys of all ranks are gathered here.
        temperature: T; default 0.2; above 0.
    Returns:
        The mean over this rank's queries. The mean over ranks is the loss of the global batch.
    Raises:
        ValueError: the shapes differ, or the temperature is not positive.
    """
    if q.dim() != 2 or q.shape != k.shape:
        raise ValueError(
            f"q and k must have one shape (N, D), got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    q, keys = F.normalize(q, dim=1), gather_keys(F.normalize(k.detach(), dim=1))
    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    own = torch.arange(len(q), device=q.device) + len(q) * rank
    return 2 * temperature * F.cross_entropy(q @ keys.T / temperature, own)


class MoCo(nn.Module):
    """An encoder with its momentum copy and the heads.

    Args:
        encoder: a timm model with one classifier, which the projector replaces. `moco_vit_*` are
            the authors' encoders. The momentum copy is a copy of it.
        dim: width of queries and keys; default 256.
        hidden: width of the heads' hidden layers; default 4096.
        temperature: of the loss; default 0.2.
        projector_layers: default 3; the authors' ResNet-50 has 2.
        predictor_norm: end the predictor with a batch norm; default true; false for ResNet-50.
    Raises:
        ValueError: the encoder has no single Linear classifier.
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        dim: int = 256,
        hidden: int = 4096,
        temperature: float = 0.2,
        projector_layers: int = 3,
        predictor_norm: bool = True,
    ) -> None:
        super().__init__()
        self.classifier = classifier_name(encoder)
        self.temperature = temperature
        width = int(getattr(encoder, "head_hidden_size", None) or encoder.num_features)  # type: ignore[arg-type]
        projector = mlp([width, *[hidden] * (projector_layers - 1), dim])
        parent, _, name = self.classifier.rpartition(".")
        setattr(encoder.get_submodule(parent), name, projector)
        self.base_encoder = encoder
        self.momentum_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.predictor = mlp([dim, hidden, dim], last_norm=predictor_norm)

    def forward(self, x1: Tensor, x2: Tensor | None = None, momentum: float = 1.0) -> Tensor:
        """The loss of two views, in the order of the authors' step. Without `x2`: queries of `x1`.

        Both views' activations exist at once; `backward_by_view` needs half of them.

        Args:
            x1: (N, C, H, W), the first view.
            x2: (N, C, H, W), the second view of the same images.
            momentum: share of the momentum encoder that stays, in [0, 1]; default 1.
        Returns:
            The loss of this rank; or the queries (N, dim).
        """
        if x2 is None:
            return self.query_of(self.features(self.base_encoder, x1))
        q1, q2 = self.query(x1), self.query(x2)
        self.update_momentum(momentum)
        k1, k2 = self.key(x1), self.key(x2)
        return moco_loss(q1, k2, self.temperature) + moco_loss(q2, k1, self.temperature)

    def features(self, encoder: nn.Module, x: Tensor) -> Tensor:
        """Features (N, width) before the projector: for a ViT, the class token after the norm."""
        trunk: Any = encoder
        return trunk.forward_head(trunk.forward_features(x), pre_logits=True)

    def projector(self, encoder: nn.Module) -> nn.Module:
        """The projector of an encoder."""
        return encoder.get_submodule(self.classifier)

    def query(self, x: Tensor) -> Tensor:
        """Queries (N, dim) of images. A call of the module, so that `mesa_train.wrap` sees it."""
        return self(x)

    def query_of(self, features: Tensor) -> Tensor:
        """Queries (N, dim) of features."""
        return self.predictor(self.projector(self.base_encoder)(features))

    @torch.no_grad()
    def key(self, x: Tensor) -> Tensor:
        """Keys (N, dim) of images, from the momentum encoder."""
        return self.key_of(self.features(self.momentum_encoder, x))

    @torch.no_grad()
    def key_of(self, features: Tensor) -> Tensor:
        """Keys (N, dim) of the momentum encoder's features."""
        return self.projector(self.momentum_encoder)(features)

    @torch.no_grad()
    def update_momentum(self, momentum: float) -> None:
        """p <- momentum * p + (1 - momentum) * base, for parameters and not for buffers.

        In place, so that views of the parameters stay valid.

        Raises:
            ValueError: the momentum does not lie in [0, 1].
        """
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must lie in [0, 1], got {momentum}")
        pairs = zip(self.momentum_encoder.parameters(), self.base_encoder.parameters(), strict=True)
        for own, base in pairs:
            own.mul_(momentum).add_(base, alpha=1 - momentum)

    def trunk_has_batch_norm(self) -> bool:
        """True if the encoder has a batch norm before the projector."""
        heads = set(self.projector(self.base_encoder).modules())
        kinds = nn.modules.batchnorm._BatchNorm
        return any(isinstance(m, kinds) and m not in heads for m in self.base_encoder.modules())


def classifier_name(encoder: nn.Module) -> str:
    """The name of a timm model's classifier, such as "head", "fc" or "head.fc".

    Raises:
        ValueError: the model has no classifier, several, or one that is not Linear.
    """
    config = getattr(encoder, "pretrained_cfg", None) or {}
    name = config.get("classifier") or ("head" if hasattr(encoder, "head") else None)
    for need in ("forward_features", "forward_head"):
        if not hasattr(encoder, need):
            raise ValueError(f"the encoder must be a timm model: it has no {need}")
    if not isinstance(name, str):
        raise ValueError(f"the encoder must have one classifier, got {name!r}")
    head = encoder.get_submodule(name)
    if not isinstance(head, nn.Linear | nn.Identity):
        raise ValueError(f"the encoder's {name} must be Linear, got {type(head).__name__}")
    return name
