"""Questions about a tensor that is to be saved: its memory, its type, its autocast."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def of_parameter(tensor: Tensor) -> str:
    """The reason why a tensor's memory belongs to a parameter, or ""."""
    if tensor.is_leaf and tensor.requires_grad:
        return "a parameter"
    base = tensor._base if not torch.compiler.is_compiling() else None
    if base is not None and base.is_leaf and base.requires_grad:
        return "a view of a parameter"
    return ""


def frozen(tensor: Tensor) -> bool:
    """True if a tensor is a parameter without a gradient, or a view of one."""
    base = None if torch.compiler.is_compiling() else tensor._base
    owner = tensor if base is None else base
    return isinstance(owner, nn.Parameter) and not owner.requires_grad


def narrowed(tensor: Tensor) -> bool:
    """True if a tensor is a view of a part of its storage. To save it also holds the rest of the storage."""
    own = tensor.numel() * tensor.element_size()
    return tensor._is_view() and tensor.untyped_storage().nbytes() > own


def held(tensor: Tensor) -> Tensor:
    """An alias of a parameter's present data.

    The alias holds this data if `parameter.data` is exchanged before the backward, like PyTorch's saved view or
    cast of the parameter. ZeRO-3 frees and gathers a parameter by such exchanges, so its parameters are returned
    unchanged. FSDP resizes the storage, which the alias shares.
    """
    if torch.compiler.is_compiling() or hasattr(tensor, "ds_status"):
        return tensor
    # The alias is a Parameter, because hooks that move or count saved tensors skip parameters.
    if type(tensor) is torch.nn.Parameter:
        return Tensor._make_subclass(torch.nn.Parameter, tensor, False)
    alias = tensor.detach()
    if isinstance(tensor, torch.nn.Parameter):
        alias._is_param = True
    return alias


def saved_with_its_base(tensor: Tensor) -> bool:
    """True if a tensor is a part of an output that PyTorch's own node saves.

    A copy of the part would be saved in addition.
    """
    if torch.compiler.is_compiling() or not narrowed(tensor):
        return False
    base = tensor._base
    return base is not None and hasattr(type(base.grad_fn), "_saved_result")


def holds_more_than_itself(tensor: Tensor, min_bytes: int) -> bool:
    """True if a small view, such as a diagonal, holds a much larger storage. A copy of it is saved instead."""
    if torch.compiler.is_compiling():
        return False
    size = tensor.nbytes
    return (
        size < min_bytes
        and narrowed(tensor)
        and tensor.untyped_storage().nbytes() - size >= min_bytes
        and not of_parameter(tensor)
        and not saved_with_its_base(tensor)
    )


def new_bytes(tensor: Tensor) -> int:
    """Bytes that an uncompressed tensor adds; 0 for a parameter and while compiling."""
    if torch.compiler.is_compiling() or (tensor.is_leaf and tensor.requires_grad):
        return 0
    return tensor.numel() * tensor.element_size()


def is_plain(tensor: Tensor) -> bool:
    """True if a tensor is strided and neither nested nor a wrapper subclass."""
    if tensor.layout is not torch.strided or tensor.is_nested:
        return False
    kind = type(tensor)
    return kind is Tensor or kind is nn.Parameter or not is_traceable_wrapper_subclass(tensor)


def autocasts(device: str) -> bool:
    """True if autocast is active for a device type. The meta device has no autocast."""
    return device != "meta" and torch.is_autocast_enabled(device)
