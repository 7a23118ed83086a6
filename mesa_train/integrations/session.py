"""A model that is wrapped for the time of a training, for the callbacks of training frameworks."""

from __future__ import annotations

import logging

from torch import nn

from mesa_train.engine.wrap import policy_of, unwrap, wrap
from mesa_train.policy import Policy

_log = logging.getLogger(__name__)


class WrappedForTraining:
    """Wraps a model at the begin of a training, and restores it at the end.

    A model that was wrapped before has its former policy again after the training. A second `begin`
    without an `end` in between, as after an exception, keeps the state from before the first one.

    Args:
        policy: the policy; None leaves the model as it is.
    """

    def __init__(self, policy: Policy | None) -> None:
        self.policy = policy
        self._model: nn.Module | None = None
        self._before: Policy | None = None

    def begin(self, model: nn.Module, say: bool = True) -> None:
        """Wrap a model.

        Args:
            model: the module that is trained.
            say: log one line, at level INFO.

        Raises:
            ValueError: the policy does not fit the model.
        """
        if self.policy is None:
            return
        if self._model is not model:
            self._model, self._before = model, policy_of(model)
        wrap(model, self.policy)
        if say:
            modules = sum(1 for _ in model.modules())
            _log.info("wrapped %s with %d modules", type(model).__name__, modules)

    def end(self) -> None:
        """Give the model its former policy, or none."""
        model, self._model = self._model, None
        if model is None:
            return
        if self._before is None:
            unwrap(model)
        else:
            wrap(model, self._before)
