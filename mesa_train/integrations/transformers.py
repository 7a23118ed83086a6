"""Callback for the Trainer of transformers: one argument turns mesa_train on.

    from mesa_train.integrations.transformers import MesaTrainCallback

    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[MesaTrainCallback("mesa8")])

The model is wrapped when the training begins, and as before when it ends. Checkpoints have the plain
model's weights, so a run can be resumed with another policy or without mesa_train.

A Trainer hands no errors to its callbacks. A context adds the note to an out-of-memory error:

    with mesa_train.out_of_memory_notes(model):
        trainer.train()
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback

from .session import WrappedForTraining
from .setting import Setting, policy_of_setting


class MesaTrainCallback(TrainerCallback):
    """Wraps the model of a Trainer while it trains.

    It works with one process and with `accelerate launch` or `torchrun` (DDP, FSDP, DeepSpeed),
    mixed precision, `resume_from_checkpoint`, PEFT, and activation checkpointing with all of its
    arguments, `offload` among them.

    Args:
        policy: as for `mesa_train.integrations.accelerate.enable`, or the path of a policy's YAML
            file. Default: the default policy.
    Raises:
        ValueError, TypeError: as for `enable`.
    """

    def __init__(self, policy: Setting = True) -> None:
        self.session = WrappedForTraining(policy_of_setting(policy))

    def on_train_begin(
        self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any
    ) -> None:
        """Wrap the model, after Accelerate has prepared it."""
        self.session.begin(model, say=state.is_world_process_zero)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Give the model its former policy, or none."""
        self.session.end()
