"""Training on two CPU processes over gloo, launched as the README says: losses are those of one process, and any
number of ranks resumes any checkpoint."""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch
from limits import HUNG_S

from mesa_train.training.checkpoints import CheckpointError
from mesa_train.training.vit22b import config as sharded_config
from mesa_train.training.vit22b import loop as sharded_loop

REPOSITORY = Path(__file__).resolve().parents[3]
RECIPE = REPOSITORY / "recipes/vit22b"
TINY = RECIPE / "tiny.yaml"
pytestmark = pytest.mark.slow

# Sums in another order, over 6 steps of AdamW in float32; and 8-bit gradients, 0.7 % off per operand.
EXACT, CODED = 2e-5, 2e-3


def launch(*arguments, as_a_user=False):
    """Run `python ARGUMENTS...` in the repository; fails the test if it did not end well. `as_a_user`: by processes
    that begin with their imports, and torch's own agent."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    command = [str(a).replace("PORT", str(port)) for a in arguments]
    where = {"cwd": REPOSITORY, "env": environment, "timeout": HUNG_S}
    if as_a_user:
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, **where)
    else:
        done = forked.run(command, **where)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def accelerate(config, *arguments, processes=2, as_a_user=False):
    launch(
        *("-m", "accelerate.commands.launch", "--main_process_port", "PORT"),
        *("--config_file", f"recipes/vit22b/accelerate/{config}.yaml"),
        *("--num_processes", processes, "recipes/vit22b/train.py", TINY),
        *arguments,
        as_a_user=as_a_user,
    )


def settings(out, **changes):
    given = [f"train.out={out}", *[f"train.{k}={v}" for k, v in changes.items()]]
    return [part for change in given for part in ("--set", change)]


def losses(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows]


def in_process(out, **changes):
    config = sharded_config.load(TINY, settings(out, **changes)[1::2])
    rows = []
    engine = sharded_loop.train(config, rows.append)
    return [row["loss"] for row in rows], [row["norm"] for row in rows], engine


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("vit22b")


@pytest.fixture(scope="module")
def single(folder):
    """Losses of one process without mesa_train; its checkpoints are in FOLDER/single."""
    found, norms, _ = in_process(folder / "single", policy="plain", save_every=3)
    assert len(found) == 6
    (folder / "norms.json").write_text(json.dumps(norms))
    assert found[-1] < found[0] - 0.05  # it learns, so that equal losses mean something
    return found


def work(folder, processes):
    launch(
        *("-m", "torch.distributed.run", "--nproc_per_node", processes),
        *("--master_port", "PORT", REPOSITORY / "tests/recipes/vit22b/worker.py", TINY, folder),
    )


@pytest.fixture(scope="module")
def worker(folder, single):
    work(folder, 2)
    return json.loads((folder / "found.json").read_text())


def test_four_processes_in_a_2x2_mesh(worker, single, folder):
    """Tensor parallelism times FSDP2; its checkpoint in one process, one of two ranks in it."""
    work(folder, 4)
    found = json.loads((folder / "found4.json").read_text())
    for case, tolerance in (("2x2", EXACT), ("2x2 mesa8", CODED)):
        assert found[case]["local"] == [112, 64]
        assert found[case]["losses"] == pytest.approx(single, abs=tolerance)
        norms = json.loads((folder / "norms.json").read_text())
        assert found[case]["norms"] == pytest.approx(norms, rel=5 * tolerance)
    assert found["2x2 resumes tp"]["losses"] == pytest.approx(single[3:], abs=EXACT)
    checkpoint = folder / "2x2/step-00000003"
    alone, _, _ = in_process(folder / "one of four", policy="plain", resume=checkpoint)
    assert alone == pytest.approx(single[3:], abs=EXACT)


def test_8_bit_moments_on_shards(worker, folder):
    """As one process has them; a checkpoint of two ranks in two and in one."""
    pytest.importorskip("bitsandbytes")
    changes = ["optim.name=adamw8bit", "train.policy=mesa8"]
    config = sharded_config.load(TINY, [*settings(folder / "adam8")[1::2], *changes])
    rows = []
    sharded_loop.train(config, rows.append)
    alone = [row["loss"] for row in rows]
    # Shards of other sizes have other blocks of 256 codes, or float32 moments below 4,096 elements.
    assert worker["fsdp2 adamw8bit"]["losses"] == pytest.approx(alone, abs=CODED)
    expected = worker["fsdp2 adamw8bit"]["losses"][3:]
    # Moments are coded once more on the way: 0.4 % of a block's largest, in three steps.
    assert worker["fsdp2 adamw8bit resumes"]["losses"] == pytest.approx(expected, abs=1e-4)
    checkpoint = folder / "fsdp2 adamw8bit/step-00000003"
    config = sharded_config.load(
        TINY, [*settings(folder / "adam8 on one", resume=checkpoint)[1::2], *changes]
    )
    rows = []
    engine = sharded_loop.train(config, rows.append)
    assert [row["loss"] for row in rows] == pytest.approx(expected, abs=CODED)
    codes = [s["state1"].dtype for s in engine.optimizer.inner.state.values()]
    assert torch.uint8 in codes


@pytest.mark.parametrize(
    ("case", "tolerance"),
    [
        ("fsdp2", EXACT),
        ("fsdp2 lossless", EXACT),
        ("fsdp2 mesa8-recompute", CODED),
        ("fsdp2 coded inputs", CODED),
        ("fsdp2 offloaded", EXACT),
        ("fsdp2 bf16", 2e-2),  # bfloat16's own error
        ("tp", EXACT),
        ("tp lossless", EXACT),
        ("tp mesa8", CODED),
        ("tokens", EXACT),
        ("tokens mesa8", CODED),
    ],
)
def test_two_processes_train_as_one(worker, single, folder, case, tolerance):
    found = worker[case]
    assert found["world"] == 2
    assert found["global"] == [448, 64]
    assert found["local"] == [224, 64]
    assert ("StridedShard" in found["placements"]) == case.startswith(("tp", "tokens"))
    assert found["losses"] == pytest.approx(single, abs=tolerance)
    # A gradient that were not summed over the ranks would show here first.
    norms = json.loads((folder / "norms.json").read_text())
    assert found["norms"] == pytest.approx(norms, rel=5 * tolerance)


def test_checkpoints_reshard(worker, single, folder):
    resumed = [case for case in worker if " resumes " in case]
    assert len(resumed) == 6
    for case in resumed:
        assert worker[case]["losses"] == pytest.approx(single[3:], abs=EXACT), case
    for source in ("fsdp2", "tp"):
        checkpoint = folder / source / "step-00000003"
        found, _, _ = in_process(folder / f"one of {source}", policy="plain", resume=checkpoint)
        assert found == pytest.approx(single[3:], abs=EXACT), source


def test_consolidated_weights_come_back(worker, folder, single):
    changes = {"policy": "plain", "steps": 5}
    config = sharded_config.load(
        TINY,
        [*settings(folder / "weighted", **changes)[1::2], f"model.weights={folder / 'weights'}"],
    )
    rows = []
    engine = sharded_loop.train(config, rows.append)
    _, _, resumed = in_process(folder / "last", policy="plain", resume=folder / "tp/step-00000006")
    start = {n: v.clone() for n, v in resumed.model.state_dict().items()}
    assert len(list((folder / "weights").glob("*.safetensors"))) == 3 + 1
    # The first step has no learning rate: its loss is that of the weights that were read.
    assert rows[0]["loss"] < single[-1] + 0.01
    from safetensors.torch import load_file

    read = {}
    for file in (folder / "weights").glob("*.safetensors"):
        read |= load_file(file)
    assert read.keys() == start.keys()
    assert all(torch.equal(read[n], v) for n, v in start.items())
    assert engine.rank == 0


def test_fsdp2_as_the_readme_says(folder, single):
    out = folder / "fsdp2 launched"
    accelerate("fsdp2", *settings(out, policy="mesa8", tensor_parallel=2), as_a_user=True)
    assert losses(out) == pytest.approx(single, abs=CODED)
    assert (out / "weights/model.safetensors.index.json").is_file()


deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)


@pytest.fixture(scope="module")
def zero3(folder):
    out = settings(folder / "zero3", policy="plain", save_every=3)
    accelerate("zero3", *out, "--no-weights", as_a_user=True)
    return folder / "zero3"


def branch(zero, name):
    """A folder that holds nothing but the checkpoint in the middle."""
    out = zero.with_name(f"{zero.name} {name}")
    shutil.copytree(zero / "step-00000003", out / "step-00000003")
    return out


@deepspeed
def test_zero3_trains_as_one_process_and_shards(zero3, single):
    assert losses(zero3) == pytest.approx(single, abs=EXACT)
    files = list((zero3 / "step-00000003/zero").glob("*zero_pp_rank_*optim_states.pt"))
    assert len(files) == 2
    # Each holds half of the moments: nothing was left whole but what is small.
    sizes = [f.stat().st_size for f in files]
    assert max(sizes) < 0.75 * sum(sizes)


@deepspeed
@pytest.mark.parametrize(("processes", "policy"), [(2, "lossless"), (1, "mesa8-recompute")])
def test_zero3_resumes(zero3, single, processes, policy):
    out = branch(zero3, f"on {processes}")
    changes = settings(out, policy=policy, resume="last")
    accelerate("zero3", *changes, "--no-weights", processes=processes)
    tolerance = EXACT if policy == "lossless" else CODED
    assert losses(out) == pytest.approx(single[3:], abs=tolerance)


@deepspeed
def test_one_process_saves_and_two_resume(folder, single):
    """ZeRO-3 on one process, with the optimizer of DeepSpeed's own in bfloat16 arithmetic."""
    out = folder / "alone"
    accelerate("zero3", *settings(out, policy="plain", save_every=3), "--no-weights", processes=1)
    assert losses(out) == pytest.approx(single, abs=EXACT)
    rest = branch(out, "on two")
    accelerate("zero3", *settings(rest, policy="plain", resume="last"), "--no-weights")
    assert losses(rest) == pytest.approx(single[3:], abs=EXACT)


@deepspeed
def test_zero3_in_bfloat16_with_8_bit_moments(folder, single):
    pytest.importorskip("bitsandbytes")
    out = folder / "zero3 bf16"
    given = settings(out, policy="mesa8", precision="bf16", save_every=3)
    eight = ["--set", "optim.name=adamw8bit", "--no-weights"]
    accelerate("zero3", *given, *eight)
    # bfloat16's own error.
    assert losses(out) == pytest.approx(single, abs=2e-2)
    rest = branch(out, "resumed")
    given = settings(rest, policy="mesa8", precision="bf16", resume="last")
    accelerate("zero3", *given, *eight)
    assert losses(rest) == pytest.approx(losses(out)[3:], abs=1e-5)


@deepspeed
def test_zero3_offloaded_with_mesa_train_and_resumed_alone(folder, single):
    out = folder / "offloaded"
    accelerate("zero3_offload", *settings(out, policy="mesa8-recompute", save_every=3))
    assert losses(out) == pytest.approx(single, abs=CODED)
    again = branch(out, "on two")
    changes = settings(again, policy="mesa8-recompute", resume="last")
    accelerate("zero3_offload", *changes, "--no-weights")
    assert losses(again) == pytest.approx(losses(out)[3:], abs=EXACT)
    rest = branch(out, "alone")
    changes = settings(rest, policy="plain", resume="last")
    accelerate("zero3_offload", *changes, "--no-weights", processes=1)
    assert losses(rest) == pytest.approx(single[3:], abs=CODED)


@deepspeed
def test_zero3_on_nvme(folder):
    """Weights and moments are files while they are not needed; nothing below 1 MiB is swapped, hence
    the larger model. The first run compiles DeepSpeed's asynchronous I/O: minutes."""
    builder = pytest.importorskip("deepspeed.ops.op_builder").AsyncIOBuilder()
    if not builder.is_compatible(verbose=False):
        pytest.skip("libaio is not installed (apt-get install libaio-dev)")
    disk, out = folder / "disk", folder / "nvme"
    disk.mkdir()
    changes = [
        *("model.name=vit_22b_small", "model.image_size=28", "optim.warmup=0", "optim.cooldown=0"),
        *("train.global_batch=8", "train.micro_batch=4", "train.steps=2"),
    ]
    given = [
        *settings(out, policy="mesa8", nvme_path=disk),
        *[part for change in changes for part in ("--set", change)],
    ]
    accelerate("zero3_nvme", *given, "--no-weights")
    files = [f for f in disk.rglob("*.swp") if f.stat().st_size >= 2**20]
    assert {"optimizer", "params"} <= {p for f in files for p in KINDS if p in str(f.parent)}
    plain = [f"train.out={folder / 'nvme alone'}", "train.policy=plain", *changes]
    rows = []
    sharded_loop.train(sharded_config.load(TINY, plain), rows.append)
    assert losses(out) == pytest.approx([row["loss"] for row in rows], rel=1e-3)


KINDS = ("optimizer", "params")


def test_a_checkpoint_of_another_model_is_refused(single, folder):
    checkpoint = folder / "single/step-00000003"
    config = [f"train.out={folder / 'x'}", f"train.resume={checkpoint}", "model.qk_norm=none"]
    with pytest.raises(CheckpointError, match=r"unexpected: blocks\.0\.q_norm\.weight"):
        sharded_loop.train(sharded_config.load(TINY, config), [].append)
    config[-1] = "model.image_size=84"
    with pytest.raises(
        CheckpointError, match=r"of another shape: pos_embed \(1, 16, 64\) instead of"
    ):
        sharded_loop.train(sharded_config.load(TINY, config), [].append)
    config[1] = f"train.resume={folder / 'nowhere'}"
    with pytest.raises(CheckpointError, match="is no complete checkpoint"):
        sharded_loop.train(sharded_config.load(TINY, config), [].append)
