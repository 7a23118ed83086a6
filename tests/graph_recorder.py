"""A CUDA graph's semantics on static memory, on any device: a replay calls the captured function again.

A capture runs nothing: its effects on weights, buffers, gradients, optimizer states and the generator
are taken back. A replay writes to the tensors that the capture returned. It makes no Python assignment:
the parameters' gradients are the same objects before and after it.
"""

import contextlib
import sys

import pytest
import torch
from torch import nn

from mesa_train.graphs import backend


class GraphRecorder:
    """Stands for `CudaGraphs`. `log` has one word for each eager run, capture and replay."""

    def __init__(self, device, model, optimizer=None):
        self.device, self.model, self.optimizer = device, model, optimizer
        self.log = []

    def eager(self, function):
        self.log.append("eager")
        return function()

    def capture(self, function):
        self.log.append("capture")
        with self._taken_back():
            outputs = function()

        def replay():
            self.log.append("replay")
            before = [p.grad for p in self.model.parameters()]
            again = function()
            if outputs is not None:
                outputs.copy_(again)
            for parameter, grad in zip(self.model.parameters(), before, strict=True):
                parameter.grad = grad

        return replay, outputs

    @contextlib.contextmanager
    def _taken_back(self):
        tensors = [*self.model.parameters(), *self.model.buffers()]
        tensors += [p.grad for p in self.model.parameters() if p.grad is not None]
        if self.optimizer is not None:
            states = self.optimizer.state.values()
            tensors += [v for s in states for v in s.values() if isinstance(v, torch.Tensor)]
        copies, random = [t.detach().clone() for t in tensors], torch.get_rng_state()
        yield
        torch.set_rng_state(random)
        with torch.no_grad():
            for tensor, copy in zip(tensors, copies, strict=True):
                tensor.copy_(copy)


@pytest.fixture
def record(monkeypatch):
    """record(model, optimizer) makes capture_step use a recorder, and returns it."""

    def use(model: nn.Module, optimizer=None):
        made = GraphRecorder(torch.device("cpu"), model, optimizer)
        monkeypatch.setattr(backend, "CudaGraphs", lambda device: made)
        return made

    return use


@pytest.fixture
def capturable_on_cpu(monkeypatch):
    """torch.optim's Adam and AdamW accept capturable=True on a CPU. Their arithmetic is the GPU's."""
    adam = sys.modules["torch.optim.adam"]
    monkeypatch.setattr(adam, "_get_capturable_supported_devices", lambda *_, **__: ["cpu", "cuda"])
