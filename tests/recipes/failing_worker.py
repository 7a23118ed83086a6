"""Worker: recipes whose files fail on one rank or on both, one after another in one launch.

Arguments: a folder, and cases of a recipe and a fault. Writes FOLDER/found-RANK.json: the exit code and the lines
of each case but the last, which ends the process as the recipe does.
"""

import contextlib
import ctypes
import importlib.util
import io
import json
import os
import resource
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from mesa_train.training.classification import run
from mesa_train.training.classification.command import train_from
from mesa_train.training.vit22b.fsdp2 import FSDP2Backend
from mesa_train.training.vit22b.zero3 import ZeRO3Backend

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
RANK = int(os.environ["RANK"])
LIMITS = resource.getrlimit(resource.RLIMIT_FSIZE)


def full(out):
    """The disk of rank 1 alone."""
    if RANK == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, LIMITS[1]))


def read_only(out):
    """Folders of checkpoints, for root too, who may write anywhere until the process gives that up."""
    if RANK == 0:
        for folder in (out / "checkpoints", out):
            if folder.is_dir():
                folder.chmod(0o555)
    if os.geteuid() == 0:
        system = ctypes.CDLL(None)
        header, sets = (ctypes.c_uint32 * 2)(0x20080522), (ctypes.c_uint32 * 6)()
        assert system.capget(header, sets) == 0
        sets[0] &= ~0b110  # effective: to override permissions of writing, of reading
        assert system.capset(header, sets) == 0


def removed(out):
    if RANK == 0:
        shutil.rmtree(out)


FAULTS = {"full": full, "read-only": read_only, "removed": removed}


@contextlib.contextmanager
def after(steps, owner, out, fault):
    """All ranks meet the fault after this many steps."""
    step, done = owner.step, []

    def stepped(*arguments):
        result = step(*arguments)
        done.append(None)
        if len(done) == steps:
            dist.barrier()
            FAULTS[fault](out)
            dist.barrier()
        return result

    owner.step = stepped
    try:
        yield
    finally:
        owner.step = step


def script(folder, last):
    path = RECIPES / folder / "train.py"
    specification = importlib.util.spec_from_file_location(f"{folder}_train", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    if not last and hasattr(module, "leave"):
        module.leave = sys.exit
    return module


def litv2(out, fault, last):
    """Five steps, a checkpoint after every other one."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    changes = [
        *("model.name=test_vit", "model.drop_path=0", "data.source=digits", "data.image_size=32"),
        *("train.device=cpu", "train.tracker=none", "train.log_every=1", "train.epochs=1"),
        *("train.global_batch=256", "train.save_every=2", "optim.warmup_epochs=0"),
        f"train.out={out}",
    ]
    with after(3, run.Run, out, fault):
        train_from(RECIPES / "litv2/quickstart.yaml", changes)


def vit22b(out, last, *changes):
    """Six steps, a checkpoint after every other one."""
    given = [f"train.out={out}", "train.policy=plain", "train.save_every=2", *changes]
    script("vit22b", last).main(RECIPES / "vit22b/tiny.yaml", given, False, False, None)


def fsdp2(out, fault, last):
    with after(3, FSDP2Backend, out, fault):
        vit22b(out, last)


def zero3(out, fault, last):
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(RECIPES / "vit22b/accelerate/zero3.json")
    os.environ["ACCELERATE_DEEPSPEED_ZERO3_INIT"] = "false"
    if fault == "damaged":
        before = out.with_name("zero3 full")
        if RANK == 1:
            (shard,) = before.glob("step-*/zero/zero_pp_rank_1_*optim_states.pt")
            shard.write_bytes(shard.read_bytes()[:1000])
        dist.barrier()
        vit22b(before, last, "train.resume=last")
    with after(3, ZeRO3Backend, out, fault):
        vit22b(out, last)


def main(folder, cases):
    found = {}
    for case in cases:
        recipe, fault = case.split()
        last, said, code = case == cases[-1], io.StringIO(), 0
        with contextlib.redirect_stderr(sys.stderr if last else said):
            try:
                globals()[recipe](folder / case, fault, last)
            except SystemExit as error:
                if last:
                    raise
                code = error.code
        resource.setrlimit(resource.RLIMIT_FSIZE, LIMITS)
        lines = [*said.getvalue().splitlines(), *([code] if isinstance(code, str) else [])]
        # Python leaves a script with 1 if it is given a text.
        found[case] = {
            "code": 1 if isinstance(code, str) else code,
            "said": [line for line in lines if str(folder) in line],
        }
        (folder / f"found-{RANK}.json").write_text(json.dumps(found))
        _forget()
        dist.barrier()


def _forget():
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2:])
