"""Old names of modules, from before the package was ordered by folders. They work for one release.

An import of an old name returns the module at its new place, after a DeprecationWarning that names
the new place. Names that moved on to a third module are not found.

Cost: none, until an import finds no module.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
import warnings
from collections.abc import Sequence
from typing import Any

# Old and new module names, without the prefix `mesa_train.`.
MOVED = dict(
    line.split()
    for line in """
    bound engine.bound
    entry engine.entry
    functions utils.torch_functions
    intercept engine.intercept
    memory.approx_bp methods.approx_bp
    memory.blocks measure.profiling.blocks
    memory.charts report.charts
    memory.checkpointing methods.checkpointing
    memory.columns report.columns
    memory.compare measure.runner
    memory.contenders methods.spec
    memory.costs measure.profiling.times
    memory.coverage measure.coverage
    memory.errors utils.errors
    memory.estimate estimate.estimator
    memory.factory loading.factory
    memory.fakes measure.fake_tensors
    memory.fitting compare.batch_size_finder
    memory.footprint measure.footprint
    memory.frontier report.frontier
    memory.gradients measure.step
    memory.inputs loading.inputs
    memory.labels report.charts
    memory.launch estimate.launch
    memory.load loading.model
    memory.lora estimate.lora
    memory.marks measure.timeline
    memory.methods methods.apply
    memory.on_gpu measure.fake_tensors
    memory.pace measure.profiling.times
    memory.peak measure.peak
    memory.planner planner.planner
    memory.plans planner.plan
    memory.plays measure.profiling.simulator
    memory.processes compare.scheduler
    memory.prospect measure.profiling.search_space
    memory.quick compare.counted
    memory.recorder measure.saved_tensors
    memory.report report.html
    memory.results report.results
    memory.scratch measure.peak
    memory.sensitivity measure.profiling.sensitivity
    memory.server compare.fork_server
    memory.sharding estimate.model_states
    memory.sites measure.profiling.candidates
    memory.solver planner.solver
    memory.standins measure.isolation
    memory.states measure.optimizer_states
    memory.terminal report.terminal
    memory.text utils.formatting
    memory.timeline measure.timeline
    memory.tree measure.module_tree
    memory.variants methods.variants
    memory.worker compare.worker
    mirror engine.mirror
    models.classifier models.lit.classifier
    models.deformable_merging models.lit.deformable_merging
    models.early_attention models.lit.early_attention
    models.hilo models.lit.hilo
    models.lit_ti models.lit.lit_ti
    models.litv2 models.lit.litv2
    models.official models.lit.official
    models.pyramid models.lit.pyramid
    models.vit22b_convert models.vit22b.convert
    models.vit22b_init models.vit22b.init
    models.vit22b_parallel models.vit22b.parallel
    models.vit22b_tokens models.vit22b.sequence_parallel
    modes engine.modes
    neighbours stash.backward_cache
    offload stash.offload
    sharded stash.sharded_parameters
    steps engine.step_counter
    training.accelerated training.classification.accelerated
    training.config training.classification.config
    training.decode training.data.decode
    training.engine training.trainer
    training.estimates training.vit22b.estimates
    training.features training.evaluation.linear_probe
    training.folder training.data.folder
    training.hub training.data.hub
    training.image_records training.data.image_records
    training.in_backward training.optim.optimizer_in_backward
    training.labels training.data.labels
    training.loader training.data.loader
    training.local_shards training.optim.sharded_adamw8bit
    training.models training.small_models
    training.nf4_lora training.vit22b.qlora
    training.optimizers training.classification.optimizers
    training.plan training.classification.dry_run
    training.plots report.figures
    training.precision utils.precision
    training.recipe training.classification.fit
    training.records utils.records
    training.robustness training.evaluation.robustness
    training.run training.classification.run
    training.schedule_rsqrt training.vit22b.schedule
    training.schema training.config_schema
    training.sharded_checkpoint training.vit22b.checkpoint
    training.sharded_config training.vit22b.config
    training.sharded_data training.vit22b.data
    training.sharded_engines training.vit22b.backend
    training.sharded_loop training.vit22b.loop
    training.sharded_plan training.vit22b.dry_run
    training.sharded_zero training.vit22b.zero3_checkpoint
    training.sources training.data.sources
    training.stability training.vit22b.stability
    training.stochastic_rounding training.optim.optimizer_in_backward
    yaml_text utils.yaml_text
""".strip().splitlines()
)


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules of `MOVED`.

    It is the last finder of the import system. So Python calls it only for names that no other
    finder knows.
    """

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,  # noqa: ARG002 - the protocol
        target: types.ModuleType | None = None,  # noqa: ARG002
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, name = fullname.partition(".")
        if package != "mesa_train" or (name not in MOVED and name != "memory"):
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=name == "memory")

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        """Make a module whose names are the names of the module at the new place."""
        module = types.ModuleType(spec.name)
        name = spec.name.partition(".")[2]
        if name in MOVED:
            now = f"mesa_train.{MOVED[name]}"
            # Points at the line that imports, because Python skips the frames of the import system.
            warnings.warn(f"{spec.name} is {now} now", DeprecationWarning, stacklevel=2)
            moved = importlib.import_module(now)

            def attribute(wanted: str) -> Any:
                return getattr(moved, wanted)

            vars(module)["__getattr__"] = attribute
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """Do nothing: the module has no code to run."""


def install() -> None:
    """Register the finder of old names, at most once."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.append(Finder())
