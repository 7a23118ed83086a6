"""Sections of `gpu_first_run.py` that compare with PyTorch and with the reference."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import mesa_train
from mesa_train import Policy, kernels
from mesa_train.engine import native
from mesa_train.kernels import reference
from mesa_train.kernels.triton import load as triton_load
from mesa_train.kernels.triton import schemas as triton_schemas
from mesa_train.utils import attention_backend

if TYPE_CHECKING:
    from gpu_worker import Bench

EXACT = Policy(bits=32, min_bytes=0)
BACKENDS = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")


def environment(bench: Bench) -> None:
    """Write the device, its libraries, and PyTorch's choice of attention."""
    kernels.load()
    values: dict[str, Any] = {"package": os.path.relpath(mesa_train.__file__)}
    q = torch.randn(2, 4, 197, 64, device=bench.device, dtype=torch.bfloat16, requires_grad=True)
    with mesa_train.compress(EXACT):
        F.scaled_dot_product_attention(q, q, q)
    values["native_rows"] = native.extension is not None
    values["attention_choice"] = torch._fused_sdp_choice(q, q, q)
    values["cudnn_masked_score"] = str(attention_backend.cudnn_masked_score())
    if bench.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        values |= {
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "triton_obstacle": triton_load._obstacle(torch.device("cuda", 0)),
        }
    bench.row(**values)


def masks(tokens: int, bench: Bench) -> Iterator[tuple[str, Tensor | None]]:
    """The kinds of masks: none, bool, an additive one, a trained table of positions, a slice."""
    where: dict[str, Any] = {"device": bench.device}
    half: dict[str, Any] = {**where, "dtype": torch.bfloat16}
    yield "none", None
    yield "bool", torch.rand(2, 1, tokens, tokens, **where) > 0.3
    yield "float", torch.randn(2, 1, tokens, tokens, **half)
    yield "trained", torch.randn(1, 4, tokens, tokens, **half).requires_grad_()
    yield "table", torch.randn(tokens, tokens, 4, **half).permute(2, 0, 1)[None].requires_grad_()
    yield "slice", torch.randn(1, 4, tokens, tokens + 3, **half)[..., 3:]


def attention(bench: Bench) -> None:
    """Compare every backend with PyTorch: the output bit for bit, and the gradients' error."""
    chosen = (None, *BACKENDS) if bench.device == "cuda" else (None, "MATH")
    for backend in chosen:
        for tokens in (197, 49, 64) if backend != "MATH" else (49,):
            for name, mask in masks(tokens, bench):
                result = _attention(bench, backend, tokens, mask)
                bench.row(backend=backend or "PyTorch's choice", tokens=tokens, mask=name, **result)


def _attention(
    bench: Bench, backend: str | None, tokens: int, mask: Tensor | None
) -> dict[str, Any]:
    """One call, plain and with mesa_train."""
    where: dict[str, Any] = {"device": bench.device, "dtype": torch.bfloat16}
    qkv = torch.randn(2, tokens, 3, 4, 64, **where, requires_grad=True)
    wanted = [qkv, *([mask] if mask is not None and mask.requires_grad else [])]
    grad = torch.randn(2, 4, tokens, 64, **where)

    def call() -> tuple[Tensor, tuple[Tensor, ...]]:
        q, k, v = [qkv[:, :, i].transpose(1, 2) for i in range(3)]
        output = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return output, torch.autograd.grad(output, wanted, grad)

    only = sdpa_kernel(getattr(SDPBackend, backend)) if backend else contextlib.nullcontext()
    with only:
        try:
            expected_output, expected = call()
        except RuntimeError as reason:
            return {"unsupported": str(reason).splitlines()[0][:160]}
        try:
            with mesa_train.compress(EXACT):
                output, found = call()
        except RuntimeError as error:
            return {"error": f"{type(error).__name__}: {str(error)[:200]}"}
    return {
        "node": type(output.grad_fn).__name__,
        "same_output": torch.equal(output, expected_output),
        "same_gradients": all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)),
        "gradient_error": max(distance(a, b) for a, b in zip(found, expected, strict=True)),
    }


def distance(found: Tensor, expected: Tensor) -> float:
    """The relative L2 distance; for integers, the share of elements that differ."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return float("inf")
    if not expected.is_floating_point():
        return float((found != expected).double().mean())
    norm = expected.double().norm()
    return float((found.double() - expected.double()).norm() / norm.clamp(min=1e-30))


def gradients(bench: Bench) -> None:
    """Compare a whole model with plain: the loss bit for bit, and the gradients with float32's."""
    import timm

    name, batch, size, options = "vit_base_patch16_224", 32, 224, {}
    if bench.tiny:
        name, batch, size, options = "vit_tiny_patch16_224", 2, 32, {"img_size": 32, "depth": 2}
    torch.manual_seed(0)
    images = torch.randn(batch, 3, size, size, device=bench.device)
    labels = torch.arange(batch, device=bench.device)
    plain_loss, exact = None, None
    for method in ("float32", "plain", "mesa8", "mesa4", "mesa8-recompute", "lossless"):
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=100, **options).to(bench.device).train()
        if method not in ("float32", "plain"):
            mesa_train.wrap(model, policy=method)
        with torch.autocast(bench.device, torch.bfloat16, enabled=method != "float32"):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        exact = found if exact is None else exact
        plain_loss = loss.item() if method == "plain" else plain_loss
        same = None if method == "float32" else loss.item() == plain_loss
        bench.row(
            model=name, batch_size=batch, method=method, loss=loss.item(), same_loss=same,
            gradient_error=distance(found, exact),
        )  # fmt: skip


# Rows, columns, group size, bits, dtype. Triton compiles anew for nearly each of them.
SHAPES = (
    (1000, 768, 128, 8, torch.bfloat16),
    (97, 197, 128, 4, torch.bfloat16),
    (1000, 768, 128, 5, torch.bfloat16),
    (97, 197, 128, 6, torch.bfloat16),
    (97, 197, 128, 3, torch.float16),
    (1000, 768, 128, 4, torch.bfloat16),
    (1000, 768, 128, 8, torch.float32),
    (40, 33, 7, 8, torch.bfloat16),
    (97, 197, 128, 2, torch.float16),
    (40, 33, 7, 5, torch.float32),
    (333, 3072, 128, 8, torch.bfloat16),
    (97, 197, 128, 8, torch.float32),
)
OPERATORS_S = 90


def operators(bench: Bench) -> None:
    """Compare every operator with its reference on this device: a row for each operator.

    After `OPERATORS_S` seconds no further shape is begun.
    """
    kernels.load()
    worst: dict[str, dict[str, Any]] = {}
    done, begin = 0, time.time()
    for full_rows, cols, group, bits, dtype in SHAPES:
        rows = min(full_rows, 8) if bench.tiny else full_rows
        if time.time() - begin > OPERATORS_S:
            break
        where = {"rows": rows, "cols": cols, "bits": bits, "dtype": str(dtype)[6:]}
        for name, run, expected in calls(bench, rows, cols, group, bits, dtype):
            _note(worst, name, where, run, expected)
        done += 1
    for name in triton_load.OPERATORS:
        found = worst.get(name, {"error": "not called"})
        bench.row(operator=name, shapes=f"{done} of {len(SHAPES)}", **found)


def _note(
    worst: dict[str, dict[str, Any]],
    name: str,
    where: dict[str, Any],
    run: Callable[[], Any],
    expected: Callable[[], Any],
) -> None:
    """Note a call if it is the worst of its operator so far. An error is worse than any distance."""
    noted = worst.setdefault(name, {"calls": 0, "distance": -1.0})
    noted["calls"] += 1
    if "error" in noted:
        return
    try:
        found, right = [t if isinstance(t, (tuple, list)) else (t,) for t in (run(), expected())]
        error = max(distance(a, b) for a, b in zip(found, right, strict=True))
    except Exception as reason:
        noted |= {"error": f"{type(reason).__name__}: {str(reason)[:200]}", **where}
        return
    if error > noted["distance"]:
        noted |= {"distance": error, **where}


def calls(
    bench: Bench, rows: int, cols: int, group: int, bits: int, dtype: torch.dtype
) -> Iterator[tuple[str, Callable[[], Any], Callable[[], Any]]]:
    """(operator, the call, the reference's call) for one shape.

    The codes of `affine_encode` and of `normalized_encode` are specified exactly. Other operators
    round differently in their last bits.
    """
    ops, device = torch.ops.mesa_train, bench.device
    torch.manual_seed(0)
    x = torch.randn(rows, 3 * cols, device=device).to(dtype)[:, cols : 2 * cols]
    grad = torch.randn(rows, cols, device=device).to(dtype)
    mean, rstd = torch.randn(rows, device=device) * 0.1, torch.rand(rows, device=device) + 0.5
    weight, bias = torch.randn(cols, device=device), torch.randn(cols, device=device)
    codes, scales = reference.affine_encode(x, bits, group, False, 0)
    # Codes of stochastic rounding with this seed, which the decoders subtract below 8 bits.
    seed = 5
    dithered = reference.affine_encode(x, bits, group, True, seed)
    dithers = [(*dithered, seed)] if bits < 8 else []
    mask = x > 0
    packed = reference.bitmask_encode(mask)
    arguments: dict[str, list[tuple[Any, ...]]] = {
        "affine_encode": [(x, bits, group, stochastic, 5) for stochastic in (False, True)],
        "normalized_encode": [(x, mean, rstd, bits, group, s, 5) for s in (False, True)],
        "affine_decode": [
            (codes, scales, bits, cols, dtype),
            (codes, scales, bits, cols, dtype, weight, bias),
            *[(*coded, bits, cols, dtype, None, None, drawn) for *coded, drawn in dithers],
            *[(*coded, bits, cols, dtype, weight, bias, drawn) for *coded, drawn in dithers],
        ],
        "activation_decode": [(codes, scales, bits, cols, dtype, "gelu")],
        "activation_backward": [(grad, codes, scales, bits, kind) for kind in ("gelu", "silu")],
        "activation_pair": [(grad, codes, scales, bits, "gelu")],
        "activation_pair_sum": [(grad, codes, scales, bits, "gelu")],
        "norm_backward": [
            (grad, *coded, rstd, weight, bits, centred, dtype, drawn)
            for centred in (False, True)
            for *coded, drawn in [(codes, scales, None), *dithers]
        ],
        "softmax_backward": [
            (grad, *coded, bits, drawn) for *coded, drawn in [(codes, scales, None), *dithers]
        ],
        "scale_backward": [(grad.float(), weight, torch.bfloat16)],
        "bitmask_encode": [(mask,)],
        "bitmask_positive": [(x,)],
        "bitmask_apply": [(grad, packed, 2.0)],
        "norm_encode": [(x, weight, bias, 1e-6, True, dtype, bits, group, False, 0)],
        "activation_encode": [(x, "gelu", bits, group, False, 0)],
        "softmax_encode": [(x, dtype, bits, group, False, 0)],
    }
    for name, argument_lists in arguments.items():
        apart = hasattr(triton_schemas, name)
        right = getattr(triton_schemas if apart else reference, name)
        for given in argument_lists:
            call = getattr(ops, name).default
            yield name, _bound(call, given), _bound(right, given)


def _bound(function: Callable[..., Any], given: tuple[Any, ...]) -> Callable[[], Any]:
    return lambda: function(*given)
