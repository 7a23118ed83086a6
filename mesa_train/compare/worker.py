"""Measure one method in a process of its own: bytes, peak, gradient error, step time.

`python -m mesa_train.compare.worker` imports the packages of all jobs once and forks a child for
every job line on stdin. So a comparison of twenty methods imports PyTorch once. Damage by a method
(an out-of-memory kill, a compiler's patches, allocator state) ends with its child. `scheduler.py`
sends the jobs.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import functools
import gc
import importlib
import json
import os
import signal
import statistics
import sys
import time as clock
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mesa_train.loading.inputs import NO_BATCH, resized
from mesa_train.loading.model import load
from mesa_train.measure.footprint import footprint
from mesa_train.measure.module_tree import forward_order
from mesa_train.measure.peak import Peak, peak_of, resident
from mesa_train.measure.step import Step, cosine, default_loss, relative_error
from mesa_train.measure.timeline import timeline
from mesa_train.methods.checkpointing import NoBlocks
from mesa_train.methods.spec import MethodSpec, optimizer_bytes
from mesa_train.methods.variants import Variant
from mesa_train.utils.errors import one_line

from .batch_size_finder import largest_batch_by_trying, largest_batch_on_a_line

Row = dict[str, Any]

# From linux/prctl.h.
_PR_SET_PDEATHSIG = 1


class MethodBenchmark:
    """One method on one model and one batch.

    A job has these keys:

    * model, batch_size, image_size, device, method, rounds;
    * dtype: of autocast, or None;
    * memory_bytes: bytes that the largest batch must fit, or None;
    * reference: path of the reference, which the first job writes;
    * ready, go, timed: paths, see `alone`;
    * timing_s: see `times`;
    * shares: see `sharing`.

    Args:
        job: the values by key.
    """

    def __init__(self, job: Row) -> None:
        self.job = job
        self.spec = MethodSpec.of(job["method"])
        self.device = torch.device(job["device"])
        requested = None if job["dtype"] is None else getattr(torch, job["dtype"])
        self.autocast = self.spec.autocast(requested)
        self.run = Step(self.device, self.autocast)
        self.before = resident()
        loaded = load(
            job["model"],
            batch_size=job["batch_size"],
            image_size=job["image_size"],
            device=job["device"],
        )
        reference = Path(job["reference"])
        self.exact: list[Tensor | None] | None = None
        inputs = loaded.inputs
        if reference.exists():
            # The file also has the weights and inputs: a factory may make other random ones each
            # time.
            stored = torch.load(reference, weights_only=False, map_location=self.device)
            loaded.model.load_state_dict(stored["state"])
            inputs, self.exact = stored["inputs"], stored["gradients"]
        elif job["writes_reference"]:
            self._write_reference(loaded.model, inputs, reference)
        self.batch, self.make = loaded.batch or job["batch_size"], loaded.make
        self.model, self.inputs = self.spec.cast(loaded.model, inputs)
        self.variant = Variant(self.model, self.spec.variant)
        self.optimizer = self.spec.optimizer(self.model)

    def row(self, report: Callable[[Row], None]) -> Row:
        """Measure all columns.

        Args:
            report: called with the columns so far, in case a later step fails.
        """
        row: Row = {"method": self.spec.name, "caveats": list(self.spec.caveats)}
        with self.sharing():
            row |= self.counted()
        report(row)
        with self.alone():
            peak = self.peak()
            row["peak_bytes"] = self.static_bytes() + peak.allocated_bytes
            row["step_bytes"] = peak.allocated_bytes
            if peak.resident_bytes is not None and self.before is not None:
                row["resident_bytes"] = peak.resident_bytes - self.before
            report(row)
            row |= self.times()
        report(row)
        if self.job["memory_bytes"] is not None:
            row["largest_batch"], how = self.largest_batch(peak, row)
            if row["largest_batch"] is None:
                row["note"] = how
            else:
                row["caveats"].append(how)
        return row

    @contextlib.contextmanager
    def sharing(self) -> Iterator[None]:
        """Within the context, torch uses half of the threads if another job runs.

        Compiled code keeps its threads, because their number is compiled into it. Timed steps and
        counts of workspace run outside of this context.
        """
        threads = torch.get_num_threads()
        if self.job["shares"] and not self.spec.compiled:
            torch.set_num_threads(max(1, threads // 2))
        try:
            yield
        finally:
            torch.set_num_threads(threads)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Within the context, no other job runs.

        The job writes "ready", waits for the file "go", and writes "timed" at the end.
        """
        Path(self.job["ready"]).touch()
        while not Path(self.job["go"]).exists():
            clock.sleep(0.02)
        try:
            yield
        finally:
            Path(self.job["timed"]).touch()

    def counted(self) -> Row:
        """Gradient error, and bytes of saved tensors, weights, gradients and optimizer."""
        row: Row = {}
        self.forward_backward()
        if self.exact is not None:
            gradients = [p.grad for p in self.model.parameters()]
            row["gradient_error"] = relative_error(gradients, self.exact)
            row["gradient_cosine"] = cosine(gradients, self.exact)
            self.exact = None
        row["gradient_bytes"] = sum(
            p.grad.nbytes for p in self.model.parameters() if p.grad is not None
        )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        row["weight_bytes"] = sum(
            t.nbytes for t in (*self.model.parameters(), *self.model.buffers())
        )
        row["optimizer_bytes"] = optimizer_bytes(self.optimizer)
        return row | self.saved_bytes()

    def forward_backward(self, inputs: Any = None) -> None:
        """Compute the gradients of one batch."""
        with self.variant.active() as module:
            self.run.backward(module, self.inputs if inputs is None else inputs)

    def step(self, inputs: Any = None) -> None:
        """Run one whole training step."""
        self.forward_backward(inputs)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def saved_bytes(self) -> Row:
        """Bytes saved for the backward, and by operator and module if these have names."""
        if not self.spec.countable:
            size = self.variant.saved_bytes(lambda module: self.run.forward(module, self.inputs))
            source = "compiled graph" if self.spec.compiled else "copies in CPU memory"
            return {"saved_bytes": size, "by_operator": {source: size}}
        saved = footprint(
            self.model,
            self.inputs,
            policy=self.spec.variant,
            autocast=self.autocast,
            loss=default_loss,
        )
        return {
            "saved_bytes": saved.saved_bytes,
            "offloaded_bytes": saved.offloaded_bytes or None,
            "by_operator": saved.by_operator,
            "by_module": forward_order(saved),
        }

    def static_bytes(self) -> int:
        """Static bytes: they exist before and after a step."""
        inputs = [t for t in pytree.tree_leaves(self.inputs) if isinstance(t, Tensor)]
        tensors = [*self.model.parameters(), *self.model.buffers(), *inputs]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(storages.values()) + optimizer_bytes(self.optimizer)

    def peak(self) -> Peak:
        """Measure the peak of one step."""
        gc.collect()
        return peak_of(self.step, self.device)

    def times(self) -> Row:
        """Time whole steps: median, quartiles, images per second.

        The steps of the other columns have warmed up the method. If the steps take longer than
        "timing_s" seconds in all, fewer steps than "rounds" are timed, but at least two.
        """
        if not self.job["rounds"]:
            return {}
        times_ms: list[float] = []
        limit_s = self.job["timing_s"]
        for _ in range(self.job["rounds"]):
            times_ms.append(1e3 * self.run.seconds(self.step))
            if limit_s is not None and len(times_ms) > 1 and sum(times_ms) > 1e3 * limit_s:
                break
        median = statistics.median(times_ms)
        return {
            "step_ms": median,
            "step_ms_quartiles": quartiles(times_ms),
            "images_per_s": self.batch / median * 1e3,
            "times_ms": [round(time, 3) for time in times_ms],
        }

    def largest_batch(self, peak: Peak, row: Row) -> tuple[int | None, str]:
        """Find the largest batch whose step fits.

        Returns:
            (the batch, how it was found), or (None, the reason).
        """
        batch, memory = self.batch, self.job["memory_bytes"]
        on_gpu = self.device.type == "cuda"
        if (on_gpu or self.spec.countable) and self.resized(1) is None:
            return None, NO_BATCH
        if on_gpu:
            return largest_batch_by_trying(self, memory), "largest batch: tried on the device"
        free_bytes = memory - self.static_bytes()
        per_image = max(1, peak.allocated_bytes // batch)
        guess = max(1, free_bytes // per_image)
        if not self.spec.countable:
            return guess, f"largest batch: in proportion to the peak of batch {batch}"
        count = functools.partial(
            timeline, self.model, policy=self.spec.variant, autocast=self.autocast
        )
        largest = largest_batch_on_a_line(
            lambda n: count(self.resized(n)).peak_bytes,
            free_bytes,
            guess,
            row["saved_bytes"] / batch,
            row["gradient_bytes"],
        )
        return largest, "largest batch: computed on fake tensors"

    def resized(self, batch: int) -> Any:
        """Make inputs of another batch size: real tensors on a GPU, fake tensors elsewhere.

        Returns:
            The inputs; None if an input has no batch dimension.
        """
        on_gpu = self.device.type == "cuda"
        other = resized(self.inputs, self.batch, batch, on_gpu, self.make)
        return None if other is None else self.spec.narrowed(other)

    def _write_reference(self, model: nn.Module, inputs: Any, path: Path) -> None:
        """Write weights, inputs and the float32 gradient of the plain model."""
        state = {key: value.clone() for key, value in model.state_dict().items()}
        narrow = any(p.is_floating_point() and p.dtype != torch.float32 for p in model.parameters())
        float32_model = copy.deepcopy(model) if narrow else model
        wide, wide_inputs = MethodSpec.of("float32").cast(float32_model, inputs)
        Step(self.device, None).backward(wide, wide_inputs)
        self.exact = [p.grad for p in wide.parameters()]
        for parameter in model.parameters():
            parameter.grad = None
        for name, value in model.state_dict().items():
            value.copy_(state[name])
        reference = {"state": state, "inputs": inputs, "gradients": self.exact}
        partial = path.with_suffix(".part")
        torch.save(reference, partial)
        partial.rename(path)


def quartiles(values: list[float]) -> list[float]:
    """First and third quartile; minimum and maximum of fewer than four values."""
    if len(values) < 4:
        return [min(values), max(values)]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return [first, third]


def run(job: Row) -> None:
    """Run one job and write its row to the path "result"; a failure is a row with its reason."""
    result = Path(job["result"])

    def report(row: Row) -> None:
        partial = result.with_suffix(".part")
        partial.write_text(json.dumps(row))
        partial.rename(result)

    row: Row = {"method": job["method"]}
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    try:
        bench = MethodBenchmark(job)
        row = bench.row(report)
    except torch.OutOfMemoryError as error:
        row = _so_far(result, row) | {"note": f"out of memory: {_without_type(error)}"}
    except NoBlocks as error:
        row = _so_far(result, row) | {"note": _without_type(error)}
    except Exception as error:  # Any error of a baseline is the reason in its row.
        traceback.print_exc()
        note = f"{type(error).__name__}: {_without_type(error)}"
        row = _so_far(result, row) | {"note": note[:400]}
        # Nothing was measured: for plain, the model itself fails.
        row["broken"] = "saved_bytes" not in row
    report(row)


def _so_far(result: Path, row: Row) -> Row:
    """The columns that the job reported before it failed."""
    return json.loads(result.read_text()) if result.exists() else row


def _without_type(error: BaseException) -> str:
    """The line of an error without its type."""
    return one_line(error).removeprefix(f"{type(error).__name__}: ")


def _end_with_parent() -> None:
    """On Linux, end this process when its parent ends for any reason.

    On other systems a job without its parent runs to its end.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def serve() -> None:
    """Fork a child for every job line on stdin; print its process id, then its exit status."""
    _end_with_parent()
    jobs = sys.stdin
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    # The output of libraries goes to stderr.
    os.dup2(2, 1)
    for line in jobs:
        job = json.loads(line)
        for package in job["packages"]:
            importlib.import_module(package)
        child = os.fork()
        if child == 0:
            os.setsid()
            _end_with_parent()
            run(job)
            os._exit(0)
        answers.write(f"{child}\n")
        _, status = os.waitpid(child, 0)
        answers.write(f"{os.waitstatus_to_exitcode(status)}\n")


if __name__ == "__main__":
    serve()
