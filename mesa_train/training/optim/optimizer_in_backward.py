"""Optimizer steps inside the backward, so that at most one parameter's gradient exists at a time.

When a parameter's gradient is complete, the optimizer steps the parameter and drops the gradient
(`Tensor.register_post_accumulate_grad_hook`). There are two methods:

    factored   Adafactor (arXiv 1804.04235): row and column means of the squared gradient, no first
               moment; rows + columns floats for a matrix. Updates are clipped to a root mean
               square of `clip`. A global norm is not possible: it is not known yet.
    lion       Lion (arXiv 2302.06675): one moment, stored as 8-bit codes of mesa_train's codec,
               1.03 bytes an element, rounded stochastically so that small changes add up.

Arithmetic is in float32, a few rows at a time (`UPDATE` elements). bfloat16 weights are written
with stochastic rounding. A model thus needs 2 bytes a weight for the weights, and 0.00 or 1.03 for
the states. Gradients cannot be accumulated over several backwards, nor clipped by their global
norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mesa_train.codecs.affine import Affine
from mesa_train.measure.optimizer_states import IN_BACKWARD, LION_GROUP, UPDATE

METHODS = IN_BACKWARD
# Prevents a division by zero for a row of zeros.
_TINY = 1e-30


class InBackward:
    """Step parameters as soon as their gradients are complete.

    `lr` may be changed between backwards.

    Args:
        groups: as for an optimizer: dicts with "params" and "weight_decay".
        lr: learning rate.
        method: "factored" (default) or "lion".
        clip: largest root mean square of an Adafactor update; default 1.0.
        beta2_cap: upper bound of Adafactor's decay 1 - t^-0.8; default 0.999.
        betas: of Lion; default (0.9, 0.99).
        seed: of all stochastic rounding; default 0.
    Raises:
        ValueError: the method is unknown, or another InBackward already steps a parameter.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        method: str = "factored",
        *,
        clip: float = 1.0,
        beta2_cap: float = 0.999,
        betas: tuple[float, float] = (0.9, 0.99),
        seed: int = 0,
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        self.lr, self.method, self.clip = lr, method, clip
        self.beta2_cap, self.betas, self.seed = beta2_cap, betas, seed
        self.steps = 0
        self.states: list[dict[str, Any]] = []
        self.squares: list[Tensor] = []
        self._hooks = []
        self._parameters: list[nn.Parameter] = []
        update = self._factored if method == "factored" else self._lion
        for group in groups:
            for parameter in group["params"]:
                if getattr(parameter, "_stepped_in_backward", False):
                    raise ValueError(
                        "a parameter is stepped in the backward already; call remove()"
                    )
                index = len(self.states)
                self.states.append({})
                self._parameters.append(parameter)
                parameter._stepped_in_backward = True
                hook = self._stepper(index, update, float(group.get("weight_decay", 0.0)))
                self._hooks.append(parameter.register_post_accumulate_grad_hook(hook))

    def begin(self) -> None:
        """Start a step. Call it before each step's forward."""
        self.steps += 1
        self.squares = []

    def norm(self) -> Tensor:
        """The global norm of the gradients of the last backward. Call it after the backward."""
        return torch.stack(self.squares).sum().sqrt() if self.squares else torch.zeros(())

    def remove(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()
        for parameter in self._parameters:
            del parameter._stepped_in_backward  # type: ignore[attr-defined]
        self._hooks, self._parameters = [], []

    def state_dict(self) -> dict[str, Any]:
        """Steps and moments, in the order of the parameters."""
        return {"steps": self.steps, "method": self.method, "states": self.states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state.

        Raises:
            ValueError: the state is of another method or of other parameters.
        """
        if state["method"] != self.method or len(state["states"]) != len(self.states):
            raise ValueError(
                f"a state of {state['method']!r} with {len(state['states'])} parameters does not fit "
                f"{self.method!r} with {len(self.states)}"
            )
        self.steps = state["steps"]
        for own, given in zip(self.states, state["states"], strict=True):
            own.clear()
            own.update(given)

    def _stepper(
        self, index: int, update: Callable[..., None], decay: float
    ) -> Callable[[Tensor], None]:
        """The hook that steps one parameter."""

        @torch.no_grad()
        def step(parameter: Tensor) -> None:
            if self.steps == 0:
                raise RuntimeError("InBackward.begin() must be called before each step's forward")
            grad = parameter.grad
            assert grad is not None
            parameter.grad = None
            matrix = parameter.view(parameter.shape[0], -1) if parameter.dim() > 1 else parameter
            grad = grad.view(matrix.shape)
            self.squares.append(torch.linalg.vector_norm(grad, dtype=torch.float32).square())
            stream = torch.Generator(parameter.device)
            stream.manual_seed((self.seed << 40) ^ (self.steps << 16) ^ index)
            update(self.states[index], matrix, grad, decay, stream)

        return step

    def _factored(
        self, state: dict[str, Any], weight: Tensor, grad: Tensor, decay: float, stream: Any
    ) -> None:
        """One Adafactor step of a matrix or vector."""
        beta = min(1 - self.steps**-0.8, self.beta2_cap)
        if weight.dim() == 1:
            square = grad.float().square().add_(_TINY)
            scales: tuple[Tensor, ...] = (_average(state, "mean", square, beta).rsqrt(),)
        else:
            row, column = _means(grad)
            row = _average(state, "row", row, beta)
            column = _average(state, "column", column, beta)
            # E[g^2] is approximated by row * column / mean(row).
            scales = ((row / row.mean()).rsqrt()[:, None], column.rsqrt())

        def change(part: slice, g: Tensor) -> Tensor:
            g = g * scales[0][part]
            return g * scales[1] if len(scales) > 1 else g

        total = torch.zeros((), device=grad.device)
        for part, g, _ in _chunks(weight, grad):
            total += change(part, g).square().sum()
        damp = (total / grad.numel()).sqrt().div(self.clip).clamp(min=1.0)
        for part, g, w in _chunks(weight, grad):
            value = w.float() * (1 - self.lr * decay) - change(part, g) * (self.lr / damp)
            write_rounded(w, value, stream)

    def _lion(
        self, state: dict[str, Any], weight: Tensor, grad: Tensor, decay: float, stream: Any
    ) -> None:
        """One Lion step of a matrix or vector."""
        codec = Affine(8, LION_GROUP, stochastic=True, seed=self.seed + self.steps)
        kept = state.setdefault("moment", {})
        for number, (_, g, w) in enumerate(_chunks(weight, grad)):
            rows = g if g.dim() > 1 else g[None]
            moment = torch.zeros_like(rows)
            if number in kept:
                moment = codec.decode(kept[number], rows.shape[1], torch.float32)
            change = torch.lerp(rows, moment, self.betas[0]).sign_().view_as(g)
            kept[number] = codec.encode(torch.lerp(rows, moment, self.betas[1]))
            write_rounded(w, w.float() * (1 - self.lr * decay) - change * self.lr, stream)


def _chunks(weight: Tensor, grad: Tensor) -> Iterable[tuple[slice, Tensor, Tensor]]:
    """Yield (rows, gradient in float32, weight), a few rows at a time. A vector is one chunk."""
    rows = max(1, UPDATE // weight[0].numel()) if weight.dim() > 1 else len(weight)
    for start in range(0, len(weight), rows):
        part = slice(start, min(start + rows, len(weight)))
        yield part, grad[part].float(), weight[part]


def _means(grad: Tensor) -> tuple[Tensor, Tensor]:
    """Means of the squared gradient: (rows,) and (columns,)."""
    row, column = [], torch.zeros(grad.shape[1], device=grad.device)
    for _, g, _ in _chunks(grad, grad):
        square = g.square().add_(_TINY)
        row.append(square.mean(1))
        column += square.sum(0)
    return torch.cat(row), column / len(grad)


def _average(state: dict[str, Any], name: str, value: Tensor, beta: float) -> Tensor:
    """Update the running average `name` and return it."""
    if name not in state:
        state[name] = torch.zeros_like(value)
    state[name].lerp_(value, 1 - beta)
    return state[name]


def round_to_bfloat16(value: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Round float32 to bfloat16 stochastically.

    Each element becomes one of its two neighbours, the nearer one with higher probability. The
    expectation is `value`. Infinities, NaNs and exact values do not change.

    Args:
        value: float32.
        generator: of the noise; default: the global one.
    Raises:
        TypeError: `value` is not float32.
    """
    if value.dtype is not torch.float32:
        raise TypeError(f"round_to_bfloat16 takes float32, got {value.dtype}")
    # bfloat16 drops the lower 16 bits of a float32. Add a random 16-bit number, then cut.
    noise = torch.randint(
        0, 1 << 16, value.shape, dtype=torch.int32, device=value.device, generator=generator
    )
    bits = value.contiguous().view(torch.int32)
    rounded = (bits + noise).bitwise_and_(-(1 << 16)).view(torch.float32)
    return torch.where(value.isfinite(), rounded, value).to(torch.bfloat16)


def write_rounded(weight: Tensor, value: Tensor, generator: torch.Generator | None = None) -> None:
    """Write a float32 value to a weight in place; rounds stochastically to a bfloat16 weight."""
    if weight.dtype is torch.bfloat16:
        value = round_to_bfloat16(value, generator)
    weight.copy_(value)
