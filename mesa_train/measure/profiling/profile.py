"""Measure the profile of one model and batch: the bytes, seconds and error of each choice.

A planner computes plans from a profile (`planner/planner.py`). A profile takes about twenty passes
to measure and a few milliseconds to load. So `save` and `load` keep one for later plans on the same
machine.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mesa_train.measure.footprint import Footprint
from mesa_train.measure.optimizer_states import static_bytes
from mesa_train.measure.runner import StepRunner
from mesa_train.measure.stash_log import BLOCK, Key
from mesa_train.measure.step import default_loss, device_of
from mesa_train.measure.timeline import timeline
from mesa_train.methods.apply import PLAIN
from mesa_train.policy import PRESETS, Policy
from mesa_train.utils.records import provenance

from .blocks import PYTORCH, Block, BlockOption
from .candidates import KEEP, Candidate, add_offloaded_choices, as_policy
from .search_space import SearchSpace
from .sensitivity import Sensitivity, calibrate, parameter_names, typical
from .simulator import Choices, Order, Part, Row, SimulatedStep
from .times import CHECKPOINT, CHECKPOINT_CODES, TimeModel, fit_time_model, logger

# Increase with every change of the file's format.
_VERSION = 2


@dataclasses.dataclass(frozen=True)
class Profile:
    """The choices for one model and batch, with the bytes, seconds and error of each.

    Args:
        candidates: the saved tensors to choose for, in the order of the forward.
        siblings: number of children of the parent of each block, by the parent's name.
        blocks: the blocks, with the bytes, seconds and variance of each strategy.
        order: the candidates' stashes in the order of the forward.
        rows: bytes that are live beside the stashes at each moment, by (block, strategy).
        times: seconds that each choice adds to the plain step.
        sensitivity: squared relative gradient error that each choice adds.
        plain_s: seconds of the plain step; None if it was not timed.
        static_bytes: bytes of weights, buffers, inputs and optimizer states.
        plain_saved_bytes: bytes that plain saves for the backward.
        plain_peak_bytes: most bytes that plain allocates in a step, beside `static_bytes`.
        other_saved_bytes: bytes saved beside the candidates under every choice.
        source: device, versions and date of the measurement.
    """

    candidates: tuple[Candidate, ...]
    siblings: Mapping[str, int]
    blocks: tuple[Block, ...]
    order: Order
    rows: Mapping[Part, list[Row]]
    times: TimeModel
    sensitivity: Sensitivity
    plain_s: float | None
    static_bytes: int
    plain_saved_bytes: int
    plain_peak_bytes: int
    other_saved_bytes: int
    source: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def step_s(self) -> float:
        """Seconds of the plain step; an estimate if the step was not timed."""
        # The matmuls that may be recomputed take about a fifth of a ViT's step.
        coding_s = sum(self.times.candidates[candidate.key, 8] for candidate in self.candidates)
        return self.plain_s or 5 * sum(self.times.matmuls.values()) or 10 * coding_s

    def policy(self, choices: Choices) -> Policy:
        """The policy of these choices."""
        return as_policy(PRESETS["mesa8"], self.candidates, choices, self.siblings)

    def saved_bytes(self, choices: Choices) -> tuple[int, int]:
        """(bytes saved on the device, bytes offloaded) under these choices."""
        offloaded = sum(
            candidate.offloaded_bytes(choices[candidate.key])
            for candidate in self.candidates
            if candidate.key in choices
        )
        strategies = [block.options.get(str(choices.get(block.key))) for block in self.blocks]
        offloaded += sum(option.offloaded_bytes for option in strategies if option is not None)
        return self.other_saved_bytes + math.ceil(_stored(self.order, choices)), offloaded

    def save(self, path: str | Path) -> None:
        """Write the profile to a JSON file."""
        Path(path).write_text(json.dumps(_encoded(self), indent=1))

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read a profile that `save` wrote.

        Raises:
            ValueError: the file is not a profile of this version; the message has the path.
        """
        try:
            return _decoded(json.loads(Path(path).read_text()))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            reason = f"no field {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{path} is not a profile of this version: {reason}") from None


def profile(
    model: nn.Module,
    inputs: Any,
    *,
    autocast: torch.dtype | None = None,
    loss: Callable[[Any], Tensor] | None = None,
    optimizer_bytes: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Profile:
    """Measure the profile that plans of `model` need; the model does not change.

    Args:
        model: the module to measure.
        inputs: as for `footprint`. A model on the meta device is only counted: its seconds and
            errors are the values of a typical GPU and ViT.
        autocast: the dtype of autocast; None runs without autocast.
        loss: from the output to a scalar; default: `default_loss`.
        optimizer_bytes: bytes of the optimizer's states; default: AdamW's for the trained
            parameters.
        progress: called with (step, its number from 0, number of steps).

    Returns:
        A `Profile`, for `Planner` or `Profile.save`.

    Raises:
        ValueError: the model saves no tensor to choose for.
    """
    return Profiler(
        model,
        inputs,
        autocast=autocast,
        loss=loss,
        optimizer_bytes=optimizer_bytes,
        progress=progress,
    ).profile


class Profiler:
    """Measures a profile and simulates steps of the same model.

    Args:
        model: as for `profile`.
        inputs: as for `profile`.
        autocast: as for `profile`.
        loss: as for `profile`.
        optimizer_bytes: as for `profile`.
        progress: as for `profile`.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        *,
        autocast: torch.dtype | None = None,
        loss: Callable[[Any], Tensor] | None = None,
        optimizer_bytes: int | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        self.model, self.inputs, self.autocast = model, inputs, autocast
        self.loss = loss or default_loss
        device = device_of(model)
        report = progress or (lambda *_: None)
        report("stashes", 0, 4)
        self.space = space = SearchSpace(model, inputs, autocast, self.loss)
        report("times", 1, 4)
        plain_s, times = fit_time_model(space, device)
        report("gradients", 2, 4)
        sensitivity = self._sensitivity(lambda name: report(f"gradient: {name}", 2, 4))
        add_offloaded_choices(sensitivity.variance, space.candidates)
        add_offloaded_choices(sensitivity.coupled, space.candidates)
        report("choosing", 3, 4)
        choices = space.all(8)
        self.profile = Profile(
            candidates=tuple(space.candidates),
            siblings=space.siblings,
            blocks=tuple(blocks_of(space, times, sensitivity)),
            order=space.order,
            rows=space.rows,
            times=times,
            sensitivity=sensitivity,
            plain_s=plain_s,
            static_bytes=static_bytes(model, inputs, optimizer_bytes),
            plain_saved_bytes=space.footprint(PLAIN).saved_bytes,
            plain_peak_bytes=self._plain_peak(),
            other_saved_bytes=space.footprint(space.policy(choices)).saved_bytes
            - math.floor(_stored(space.order, choices)),
            source=provenance("cpu" if device.type == "meta" else device),
        )

    def step(self, choices: Choices) -> SimulatedStep:
        """Simulate a step with these choices on fake tensors."""
        return self.space.simulator.simulate(self.space.policy(choices), choices)

    def rows(self, step: SimulatedStep) -> dict[Part, list[Row]]:
        """The moments of a simulated step, by (block, strategy)."""
        return self.space.simulator.rows(step, self.space.order)

    def footprint(self, policy: Policy | str) -> Footprint:
        """Count the bytes that a step saves with a policy, on fake tensors."""
        return self.space.footprint(policy)

    def _plain_peak(self) -> int:
        """Most bytes that plain allocates in a step, beside the static bytes."""
        counted = timeline(
            self.model, self.inputs, policy=PLAIN, autocast=self.autocast, loss=self.loss
        )
        plain: Choices = {(block, BLOCK, ""): PYTORCH for block in self.space.simulator.blocks}
        return self.space.simulator.with_workspace(counted, plain).peak_bytes

    def _sensitivity(self, progress: Callable[[str], None]) -> Sensitivity:
        """Measure the gradient errors; on meta or without enough memory, use typical errors."""
        space = self.space
        candidates = [*space.candidates, *space.block_inputs.values()]
        if not space.real:
            return typical(candidates)
        runner = StepRunner(self.model, self.inputs, self.autocast, self.loss)

        def gradients(policy: Policy | str | None) -> list[Tensor | None]:
            return runner.reference() if policy is None else runner.gradients(policy)

        checkpointing = {
            strategy.bits: space.policy(space.all(KEEP, name))
            for name, strategy in space.strategies.items()
            if strategy.checkpointed
            and not (strategy.codes or strategy.offloaded)
            and space.block_inputs
        }
        try:
            return calibrate(
                space.candidates,
                space.base,
                gradients,
                parameter_names(self.model),
                progress,
                list(space.block_inputs.values()),
                checkpointing,
            )
        except torch.OutOfMemoryError:
            # The passes save nearly all tensors uncompressed.
            logger.info(
                "memory is too small to measure gradient errors: the plan uses those of a typical ViT"
            )
            return typical(candidates)


def blocks_of(space: SearchSpace, times: TimeModel, sensitivity: Sensitivity) -> list[Block]:
    """The costs of every block under each strategy."""
    blocks = []
    for name in space.simulator.blocks:
        codes_variance = sum(
            sensitivity.variance[candidate.key, 8]
            for candidate in space.candidates
            if candidate.block == name
        )
        options = {}
        for label, strategy in space.strategies.items():
            timed_as = CHECKPOINT_CODES if strategy.codes else CHECKPOINT
            seconds = times.blocks[name, timed_as] if strategy.checkpointed else 0.0
            variance = codes_variance if strategy.codes else 0.0
            candidate = space.block_inputs.get(name)
            if candidate is not None and strategy.bits is not None:
                variance += sensitivity.variance[candidate.key, strategy.bits]
            saved = space.order.saved_by_block[name, label]
            offloaded = space.input_bytes(name, strategy.bits) if strategy.offloaded else 0
            options[label] = BlockOption(saved, seconds, variance, offloaded)
        blocks.append(Block(name, options))
    return blocks


def _stored(order: Order, choices: Choices) -> float:
    """Bytes of all entries on the device after the forward and all its copies."""
    total = 0.0
    for key, share in order.entries:
        if key[1] == BLOCK:
            if key[2] == "begin":
                total += order.saved_by_block.get(
                    (key[0], str(choices.get((key[0], BLOCK, "")))), 0
                )
        elif key in choices:
            total += share * order.candidates[key].bytes(choices[key])
    return total


def _encoded(profile: Profile) -> dict[str, Any]:
    """A profile as JSON values. Tables with tuple keys become lists of [*key, value]."""
    return {
        "version": _VERSION,
        "candidates": [dataclasses.asdict(candidate) for candidate in profile.candidates],
        "siblings": dict(profile.siblings),
        "blocks": [
            [block.name, {label: list(option) for label, option in block.options.items()}]
            for block in profile.blocks
        ],
        "order": [[*key, share] for key, share in profile.order.entries],
        "saved_by_block": [[*key, size] for key, size in profile.order.saved_by_block.items()],
        "rows": [[*part, [list(row) for row in rows]] for part, rows in profile.rows.items()],
        "times": {
            "candidates": [
                [*key, choice, value] for (key, choice), value in profile.times.candidates.items()
            ],
            "matmuls": profile.times.matmuls,
            "blocks": [[*key, value] for key, value in profile.times.blocks.items()],
            "host_link": profile.times.host_link,
        },
        "sensitivity": {
            "variance": [
                [*key, choice, value]
                for (key, choice), value in profile.sensitivity.variance.items()
            ],
            "coupled": [
                [*key, choice, value]
                for (key, choice), value in profile.sensitivity.coupled.items()
            ],
            "floor": profile.sensitivity.floor,
            "passes": profile.sensitivity.passes,
        },
        **{name: getattr(profile, name) for name in _SCALARS},
        "source": dict(profile.source),
    }


_SCALARS = ("plain_s", "static_bytes", "plain_saved_bytes", "plain_peak_bytes", "other_saved_bytes")


def _decoded(fields: Mapping[str, Any]) -> Profile:
    """The profile of the JSON values that `_encoded` made."""
    if fields["version"] != _VERSION:
        raise ValueError(f"its version is {fields['version']}, expected {_VERSION}")

    def table(rows: list[list[Any]]) -> dict[tuple[Key, int | str], float]:
        return {((row[0], row[1], row[2]), row[3]): row[4] for row in rows}

    candidates = []
    for candidate_fields in fields["candidates"]:
        matrices = [(rows, cols) for rows, cols in candidate_fields["matrices"]]
        source = None if candidate_fields["source"] is None else tuple(candidate_fields["source"])
        candidates.append(
            Candidate(
                **{
                    **candidate_fields,
                    "key": tuple(candidate_fields["key"]),
                    "matrices": matrices,
                    "source": source,
                }
            )
        )
    times, sensitivity = fields["times"], fields["sensitivity"]
    return Profile(
        candidates=tuple(candidates),
        siblings=fields["siblings"],
        blocks=tuple(
            Block(name, {label: BlockOption(*option) for label, option in options.items()})
            for name, options in fields["blocks"]
        ),
        order=Order(
            [((row[0], row[1], row[2]), row[3]) for row in fields["order"]],
            {candidate.key: candidate for candidate in candidates},
            {(row[0], row[1]): row[2] for row in fields["saved_by_block"]},
        ),
        rows={(row[0], row[1]): [Row(*row) for row in row[2]] for row in fields["rows"]},
        times=TimeModel(
            table(times["candidates"]),
            times["matmuls"],
            {(row[0], row[1]): row[2] for row in times["blocks"]},
            times["host_link"],
        ),
        sensitivity=Sensitivity(
            table(sensitivity["variance"]),
            table(sensitivity["coupled"]),
            sensitivity["floor"],
            sensitivity["passes"],
        ),
        source=fields["source"],
        **{name: fields[name] for name in _SCALARS},
    )
