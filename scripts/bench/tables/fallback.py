"""Tables of docs/fallback.md: which functions' saved tensors are coded, and which stay exact."""

from __future__ import annotations

from collections.abc import Sequence

from mesa_train.ops.coded import CODED
from mesa_train.utils.records import Row
from mesa_train.utils.torch_functions import function_name
from tables.text import markdown, newest_run, origin, table

_FILE, _SCRIPT = "fallback.jsonl", "python scripts/bench/fallback.py"
_ROWED = "nn.functional."


@table(_FILE, _SCRIPT)
def fallback_sizes(rows: Sequence[Row]) -> str:
    """The functions of which only sizes are saved, in one paragraph."""
    functions = sorted(
        {row["function"] for row in newest_run(rows) if decision(row["function"]) == "size"}
    )
    names = ", ".join(f"`{name}`" for name in functions if not name.startswith(_ROWED))
    return f"{names}. {origin(rows[-1])}\n"


@table(_FILE, _SCRIPT)
def fallback_coded(rows: Sequence[Row]) -> str:
    """The functions that are coded, with the error of each kind of input."""
    return _table(rows, "coded")


@table(_FILE, _SCRIPT)
def fallback_exact(rows: Sequence[Row]) -> str:
    """The functions that stay exact, with the error that codes would have made."""
    return _table(rows, "exact")


def decision(function: str) -> str:
    """ "size", "coded" or "exact" for a function's name in the rows: a name of PyTorch's test list or of
    fallback_cases, which may go on with a variant."""
    name, _, kind = function.removeprefix(_ROWED).removeprefix("fft.").partition(", ")
    name = name.removeprefix("linalg.").removeprefix("linalg_").partition(".")[0]
    if name == "grid_sample":
        return "coded" if kind else "exact"
    matches = [how for plain, how in _WAYS.items() if plain == name]
    if not matches or matches[0].masks or (name == "pow" and kind not in _POWERS):
        return "exact"
    return "size" if matches[0].sizes else "coded"


_POWERS = ("exponent 2", "exponent 3")
_WAYS = {
    function_name(f).removeprefix("fft_").removeprefix("linalg_"): way for f, way in CODED.items()
}


def _table(rows: Sequence[Row], kind: str) -> str:
    by_function: dict[str, list[Row]] = {}
    for row in newest_run(rows):
        if decision(row["function"]) == kind:
            by_function.setdefault(row["function"], []).append(row)
    lines = []
    for function, calls in sorted(by_function.items()):
        worst = max(calls, key=lambda row: row["error"])
        lines.append([f"`{function}`", _percent(worst["error"]), worst["inputs"], str(len(calls))])
    return markdown(["function", "largest error", "on", "calls"], lines) + (
        "\nThe error is the relative L2 distance of the worst gradient, with 8-bit codes in groups of 128 for every "
        f"float tensor that the call saves. {origin(rows[-1])}\n"
    )


def _percent(error: float) -> str:
    return (
        "fails, or plain's is 0"
        if error >= 1e9
        else f"over {10:,} times"
        if error > 10
        else (f"{error:.2%}")
    )
