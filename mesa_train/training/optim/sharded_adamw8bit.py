"""bitsandbytes' 8-bit AdamW on shards: each rank steps its own part of every parameter.

The library's kernels know nothing of DTensors, and elementwise updates need no other rank's part. In
a checkpoint the moments are float32 and cut as the parameters are, so that any number of ranks reads
it. Coding them again costs at most the codes' own error once more (their table has 1 but not -1, so a
block whose largest value is negative gets another scale). For the moment of a checkpoint that takes 8
bytes an element of a rank's shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

_NAMES = {"exp_avg": "1", "exp_avg_sq": "2"}
_BLOCK = 256


class LocalShards(torch.optim.Optimizer):
    """An optimizer of bitsandbytes for parameters that may be DTensors.

    groups: as for any optimizer. make: gives bitsandbytes' optimizer for groups of local tensors.
    Shards of fewer than 4,096 elements have float32 moments.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], make: Callable[[list[dict[str, Any]]], Any]
    ) -> None:
        super().__init__(groups, {})
        local = [
            {**g, "params": [nn.Parameter(_local(p).detach()) for p in g["params"]]}
            for g in self.param_groups
        ]
        self.inner = make(local)
        for own, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            for key, value in inner.items():
                own.setdefault(key, value)

    def _pairs(self) -> Iterable[tuple[nn.Parameter, nn.Parameter]]:
        for own, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            yield from zip(own["params"], inner["params"], strict=True)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of every local part that has a gradient."""
        for own, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            inner.update({k: v for k, v in own.items() if k != "params"})
        for parameter, part in self._pairs():
            grad = parameter.grad
            part.grad = None if grad is None or not part.numel() else _local(grad).to(part.dtype)
        self.inner.step(closure)
        for parameter, part in self._pairs():
            if part.grad is not None or (parameter.grad is not None and not part.numel()):
                steps = self.inner.state.get(part, {}).get("step", 0)
                # bitsandbytes holds the moments; this entry shows that moments exist.
                self.state[parameter]["step"] = torch.tensor(float(steps))
            part.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Moments in float32, DTensors where the parameters are."""
        packed: dict[str, Any] = super().state_dict()
        for index, (parameter, part) in enumerate(self._pairs()):
            if index in packed["state"]:
                packed["state"][index] = {
                    **packed["state"][index],
                    **{n: _like(self._decoded(part, k), parameter) for n, k in _NAMES.items()},
                }
        return packed

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take moments in float32, sharded as the parameters are, and code them."""
        states, parts = state_dict["state"], dict(self._pairs())
        for own, given in zip(self.param_groups, state_dict["param_groups"], strict=True):
            own.update({k: v for k, v in given.items() if k != "params"})
            for parameter, key in zip(own["params"], given["params"], strict=True):
                if key in states:
                    self._encode(parameter, parts[parameter], states[key])

    def _decoded(self, part: nn.Parameter, which: str) -> Tensor:
        state = self.inner.state.get(part)
        if not state:
            return torch.zeros_like(part, dtype=torch.float32)
        codes = state["state" + which]
        if codes.dtype is not torch.uint8:
            return codes.detach().clone()
        scale, table = state["absmax" + which], state["qmap" + which]
        return _functional().dequantize_blockwise(codes, absmax=scale, code=table, blocksize=_BLOCK)

    def _encode(self, parameter: nn.Parameter, part: nn.Parameter, given: dict[str, Any]) -> None:
        steps = given["step"]
        self.state[parameter]["step"] = torch.as_tensor(float(steps))
        if not part.numel():
            return
        group, index = self._place(part)
        if part not in self.inner.state:
            part.grad = torch.zeros_like(part)
            self.inner.init_state(self.inner.param_groups[group], part, group, index)
            part.grad = None
        state = self.inner.state[part]
        state["step"] = int(steps)
        for name, which in _NAMES.items():
            value, kept = _local(given[name]).float(), state["state" + which]
            if kept.dtype is not torch.uint8:
                kept.copy_(value)
                continue
            codes, found = _functional().quantize_blockwise(
                value, code=state["qmap" + which], blocksize=_BLOCK
            )
            kept.copy_(codes.view_as(kept))
            state["absmax" + which].copy_(found.absmax)

    def _place(self, part: nn.Parameter) -> tuple[int, int]:
        for number, group in enumerate(self.inner.param_groups):
            for index, member in enumerate(group["params"]):
                if member is part:
                    return number, index
        raise AssertionError("a part of no group")


def _functional() -> Any:
    import bitsandbytes

    return bitsandbytes.functional


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return value
    return DTensor.from_local(
        value,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
