"""Choose the arithmetic of a training: `auto` takes the best that the device has natively.

Without bfloat16 instructions a processor emulates bfloat16. On AVX2 alone, a training step under
bfloat16 autocast takes about 25 times as long as in float32 (ViT-Ti, batch 4: 5.8 s against 0.23
s). A GPU before Ampere emulates bfloat16 too, and has float16, which needs loss scaling. So `auto`
is

* bfloat16 if the device has it: AVX512_BF16 or AMX on x86, BF16 on Arm, compute capability 8.0 on
  NVIDIA, macOS 14 on Apple's GPUs;
* else float32 on a processor;
* else float16 with a gradient scaler on a GPU, or float32 for a training without a scaler.

This file needs only torch. A probe takes microseconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

# The recipes' names of autocast's dtypes; "no" is float32 without autocast.
DTYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_WORDS = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class Arithmetic:
    """The dtypes in which a device computes natively, without emulation.

    Args:
        kind: "cpu", "cuda", "mps" or another device type of torch.
        name: name of the device, for messages.
        bf16: whether it computes in bfloat16.
        fp16: whether it computes in float16.
    """

    kind: str
    name: str
    bf16: bool
    fp16: bool


@dataclass(frozen=True)
class Choice:
    """A precision for a device.

    Args:
        name: "no" (float32), "bf16" or "fp16".
        line: a sentence with the choice and its reason.
        emulated: whether the device only emulates the dtype.
    """

    name: str
    line: str
    emulated: bool

    @property
    def dtype(self) -> torch.dtype | None:
        """Autocast's dtype; None for float32."""
        return DTYPES[self.name]

    @property
    def scaler(self) -> bool:
        """True if gradients need a scaler."""
        return self.name == "fp16"


def choose(requested: str, device: Arithmetic | str, *, fp16: bool = True) -> Choice:
    """Choose the precision for a device.

    Args:
        asked: "auto", "no", "bf16" or "fp16".
        device: a device type, which is probed, or its arithmetic.
        fp16: whether the training can scale its loss; if not, auto takes float32 in place of
            float16.

    Raises:
        ValueError: `asked` is none of these.
    """
    arithmetic = probe(device) if isinstance(device, str) else device
    if requested == "auto":
        name = "bf16" if arithmetic.bf16 else "no"
        if not arithmetic.bf16 and arithmetic.kind != "cpu" and arithmetic.fp16 and fp16:
            name = "fp16"
        verb = "computes" if arithmetic.bf16 else "does not compute"
        scaled = " with loss scaling" if name == "fp16" else ""
        line = (
            f"precision auto: {_WORDS[name]}{scaled}, because {arithmetic.name} {verb} in bfloat16"
        )
        return Choice(name, line, emulated=False)
    if requested not in DTYPES:
        raise ValueError(f"precision must be one of auto, {', '.join(DTYPES)}, got {requested!r}")
    native = {"no": True, "bf16": arithmetic.bf16, "fp16": arithmetic.fp16}[requested]
    line = f"precision {requested}: {_WORDS[requested]}"
    if not native:
        better = choose("auto", arithmetic, fp16=fp16)
        line += (
            f", which {arithmetic.name} only emulates, many times slower than {_WORDS[better.name]}; "
            f"auto takes {_WORDS[better.name]}"
        )
    return Choice(requested, line, emulated=not native)


def probe(kind: str) -> Arithmetic:
    """The native arithmetic of this machine's device of a type.

    A GPU that is not present is assumed to be a current one: its bytes are only counted.
    """
    kind = kind.partition(":")[0]
    if kind == "cpu":
        return of_processor(torch.cpu.get_capabilities())
    if kind == "cuda":
        if not torch.cuda.is_available():
            return Arithmetic(kind, "a current GPU", bf16=True, fp16=True)
        name = torch.cuda.get_device_name()
        return Arithmetic(kind, name, torch.cuda.is_bf16_supported(False), fp16=True)
    if kind == "mps":
        # Metal has bfloat16 from macOS 14 on.
        recent = torch.backends.mps.is_macos_or_newer(14, 0)
        return Arithmetic(kind, "Apple's GPU", recent, fp16=True)
    module: Any = getattr(torch, kind, None)
    asks = getattr(module, "is_bf16_supported", None)
    return Arithmetic(kind, f"the {kind} device", bool(asks and asks()), fp16=True)


def of_processor(flags: Any) -> Arithmetic:
    """The native arithmetic of a processor, from torch's names of its instructions.

    Two kinds do not count: instructions that only convert bfloat16, and AVX-512 without its BF16
    extension.
    """
    bf16 = any(flags.get(flag, False) for flag in ("avx512_bf16", "amx_bf16", "bf16"))
    fp16 = any(flags.get(flag, False) for flag in ("avx512_fp16", "amx_fp16", "fp16_arith"))
    return Arithmetic("cpu", f"this processor{_called(flags)}", bf16, fp16)


def _called(flags: Any) -> str:
    """The processor's name in brackets, or ""."""
    name = flags.get("cpu_name", "")
    return f" ({name})" if isinstance(name, str) and name else ""
