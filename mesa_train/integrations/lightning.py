"""Callback for Lightning's Trainer: one argument turns mesa_train on.

    from mesa_train.integrations.lightning import MesaTrainCallback

    trainer = lightning.Trainer(callbacks=[MesaTrainCallback("mesa8")])

The LightningModule is wrapped when `fit` begins, and as before when it ends. Checkpoints have the
plain model's weights.
"""

from __future__ import annotations

from typing import Any

try:
    from lightning.pytorch import Callback
except ImportError:  # the older name of the same package
    from pytorch_lightning import Callback

from mesa_train.measure.out_of_memory import OutOfMemoryNotes

from .session import WrappedForTraining
from .setting import Setting, policy_of_setting


class MesaTrainCallback(Callback):
    """Wraps a LightningModule while it trains.

    `training_step` itself is no forward of a module. So each module that it calls applies the
    policy, and torch functions that it calls directly are PyTorch's own.

    Args:
        policy: as for `mesa_train.integrations.accelerate.enable`, or the path of a policy's YAML
            file. Default: the default policy.
    Raises:
        ValueError, TypeError: as for `enable`.
    """

    def __init__(self, policy: Setting = True) -> None:
        self.session = WrappedForTraining(policy_of_setting(policy))
        self.notes = OutOfMemoryNotes()

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Wrap the module, after its `configure_model` and after the strategy has prepared it."""
        self.session.begin(pl_module, say=trainer.is_global_zero)
        # `training_step` is no forward: the module's parts have batches.
        for part in pl_module.children():
            self.notes.watch(part)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Give the module its former policy, or none."""
        self.notes.stop()
        self.session.end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Add a note to an out-of-memory error, and give the module its former policy, or none."""
        self.notes.stop()
        self.notes.explain(exception)
        self.session.end()
