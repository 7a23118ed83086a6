"""`mesa-train run` with whole training programs in the shape of timm's and torchvision's own.

The packages of timm and torchvision come without these programs. The programs here call the parts that
the packages do have, in the order of the originals: folders of images, augmentation, averaged weights,
evaluation between the epochs, a checkpoint, and a second call that resumes.
"""

import re

import forked
import numpy as np
import pytest
import torch
from limits import HUNG_S
from PIL import Image

# timm's train.py: the task takes the model before or after the optimizer does.
TIMM = """
import argparse, torch, timm
from timm.data import Mixup, create_dataset, create_loader
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask, LogitDistillationTask
from timm.utils import CheckpointSaver, NativeScaler, accuracy, random_seed
import mesa_train

parser = argparse.ArgumentParser()
parser.add_argument("data")
parser.add_argument("--model", default="vit_tiny_patch16_224")
parser.add_argument("--epochs", type=int, default=1)
parser.add_argument("--resume", default="")
parser.add_argument("--output", default="out")
parser.add_argument("--distil", action="store_true")
parser.add_argument("--task-first", action="store_true")
parser.add_argument("--grad-checkpointing", action="store_true")
args = parser.parse_args()
random_seed(0)
sizes = {"img_size": 32, "depth": 3, "embed_dim": 96, "num_heads": 3, "num_classes": 4}
model = timm.create_model(args.model, **sizes, drop_path_rate=0.1)
model.set_grad_checkpointing(args.grad_checkpointing)
device = torch.device("cpu")

def make_task():
    if args.distil:
        teacher = timm.create_model(args.model, **sizes)
        return LogitDistillationTask(model, teacher, task_loss_weight=0.5, device=device, verbose=False)
    return ClassificationTask(model, torch.nn.CrossEntropyLoss(), device=device, verbose=False)

task = make_task() if args.task_first else None
optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.9)
task = task or make_task()
task.setup_ema(decay=0.9)
scaler = NativeScaler("cpu")
start = 0
if args.resume:
    state = torch.load(args.resume, weights_only=False)
    task.load_checkpoint_state(state["state_dict"])
    task.load_checkpoint_state(state["state_dict_ema"], ema=True)
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state[scaler.state_dict_key])
    start = state["epoch"] + 1
common = {"input_size": (3, 32, 32), "batch_size": 8, "num_workers": 0, "use_prefetcher": False,
          "device": device, "persistent_workers": False}
train = create_loader(create_dataset("", args.data, is_training=True), **common, is_training=True,
                      re_prob=0.2, auto_augment="rand-m9-mstd0.5")
evaluation = create_loader(create_dataset("", args.data), **common)
mixup = Mixup(mixup_alpha=0.2, cutmix_alpha=1.0, num_classes=4) if not args.distil else None
schedule, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=args.epochs + 1)
saver = CheckpointSaver(model, optimizer, args=args, amp_scaler=scaler, task=task,
                        checkpoint_dir=args.output, recovery_dir=args.output)
for epoch in range(start, args.epochs):
    task.train()
    for images, labels in train:
        if mixup is not None:
            images, labels = mixup(images, labels)
        with torch.autocast("cpu", torch.float16):
            loss = task(images, labels)["loss"]
        scaler(loss, optimizer, clip_grad=1.0, parameters=task.get_clip_parameters())
        optimizer.zero_grad()
        task.update_ema()
    codes = any("8 bits" in row.how for row in mesa_train.coverage(model).rows)
    for averaged in (False, True):
        network = task.get_eval_model(ema=averaged).eval()
        with torch.inference_mode():
            top1 = sum(float(accuracy(network(x), y)[0]) for x, y in evaluation)
    schedule.step(epoch + 1, top1)
    saver.save_checkpoint(epoch, metric=top1)
    print("epoch", epoch, "codes", codes, "loss", torch.isfinite(loss).item())
"""
# torchvision's references/classification/train.py.
TORCHVISION = """
import argparse, os, torch, torchvision
from torchvision.transforms import v2
import mesa_train

parser = argparse.ArgumentParser()
parser.add_argument("data")
parser.add_argument("--model", default="resnet18")
parser.add_argument("--epochs", type=int, default=1)
parser.add_argument("--resume", default="")
parser.add_argument("--output", default="out")
args = parser.parse_args()
augment = v2.Compose([v2.RandomResizedCrop(32), v2.RandomHorizontalFlip(), v2.TrivialAugmentWide(),
                      v2.PILToTensor(), v2.ToDtype(torch.float, scale=True), v2.RandomErasing(0.2)])
mix = v2.RandomChoice([v2.MixUp(num_classes=4), v2.CutMix(num_classes=4)])
data = torchvision.datasets.ImageFolder(args.data, augment)
collate = torch.utils.data.default_collate
loader = torch.utils.data.DataLoader(data, 8, shuffle=True, collate_fn=lambda batch: mix(*collate(batch)))
model = torchvision.models.get_model(args.model, weights=None, num_classes=4)
criterion = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
groups = torchvision.ops._utils.split_normalization_params(model)
optimizer = torch.optim.SGD([{"params": p, "weight_decay": w} for p, w in zip(groups, (0.0, 1e-4)) if p],
                            lr=0.01, momentum=0.9, nesterov=True)
warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=1)
cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=2)
schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], milestones=[1])
averaged = torch.optim.swa_utils.AveragedModel(
    model, avg_fn=torch.optim.swa_utils.get_ema_avg_fn(0.9), use_buffers=True)
start = 0
if args.resume:
    state = torch.load(args.resume)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["lr_scheduler"])
    averaged.load_state_dict(state["model_ema"])
    start = state["epoch"] + 1
for epoch in range(start, args.epochs):
    model.train()
    for images, labels in loader:
        loss = criterion(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        averaged.update_parameters(model)
    codes = any("8 bits" in row.how for row in mesa_train.coverage(model).rows)
    schedule.step()
    for network in (model, averaged):
        network.eval()
        with torch.inference_mode():
            for images, labels in loader:
                network(images)
    os.makedirs(args.output, exist_ok=True)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch,
                "lr_scheduler": schedule.state_dict(), "model_ema": averaged.state_dict()},
               os.path.join(args.output, "last.pth"))
    print("epoch", epoch, "codes", codes, "loss", torch.isfinite(loss).item())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four classes of four images."""
    root = tmp_path_factory.mktemp("images")
    for n in range(16):
        pixels = np.random.default_rng(n).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        (root / f"class{n % 4}").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(root / f"class{n % 4}" / f"{n}.png")
    return root


def run(source, tmp_path, folder, *arguments):
    """Run a program untouched; return (the lines of `mesa-train run`, the program's lines)."""
    (tmp_path / "out").mkdir(exist_ok=True)
    script = tmp_path / "train.py"
    script.write_text(source)
    command = ["-m", "mesa_train.cli", "run", "--policy", "mesa8", script, folder, *arguments]
    done = forked.run(command, cwd=tmp_path, timeout=HUNG_S)
    assert done.returncode == 0, done.stderr[-3000:]
    said = re.findall(r"mesa-train run: (.*)", done.stderr)
    return said, [line for line in done.stdout.splitlines() if line.startswith("epoch")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "found"),
    [
        ([], "VisionTransformer"),
        (["--task-first"], "ClassificationTask"),
        (["--distil"], "VisionTransformer"),
        (["--distil", "--task-first"], "LogitDistillationTask"),
        (["--grad-checkpointing"], "VisionTransformer"),
    ],
    ids=lambda value: "-".join(value) or "plain" if isinstance(value, list) else "",
)
@pytest.mark.compatibility("mesa-train run", "timm's tasks, checkpoints and resume")
def test_timms_program_trains_saves_and_resumes(options, found, tmp_path, folder):
    pytest.importorskip("timm.task")
    said, lines = run(TIMM, tmp_path, folder, *options)
    assert len(said) == 1
    assert re.fullmatch(rf"wrapped {found} \(.*\), found at AdamW", said[0])
    assert lines == ["epoch 0 codes True loss True"]
    state = torch.load(tmp_path / "out/last.pth.tar", weights_only=False)
    plain = timm_model().state_dict()
    for name in ("state_dict", "state_dict_ema"):
        assert {k: v.shape for k, v in state[name].items()} == {
            k: v.shape for k, v in plain.items()
        }
    resume = ["--resume", tmp_path / "out/last.pth.tar", "--epochs", "2"]
    said, lines = run(TIMM, tmp_path, folder, *options, *resume)
    assert lines == ["epoch 1 codes True loss True"]


def timm_model():
    """The model of timm's program, without mesa_train."""
    import timm

    sizes = {"img_size": 32, "depth": 3, "embed_dim": 96, "num_heads": 3, "num_classes": 4}
    return timm.create_model("vit_tiny_patch16_224", **sizes)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["resnet18", "swin_t"])
@pytest.mark.compatibility(
    "mesa-train run", "torchvision's classification: averaged weights, resume"
)
def test_torchvisions_program_trains_saves_and_resumes(model, tmp_path, folder):
    torchvision = pytest.importorskip("torchvision")
    said, lines = run(TORCHVISION, tmp_path, folder, "--model", model)
    assert len(said) == 1
    assert re.fullmatch(r"wrapped (ResNet|SwinTransformer) \(.*\), found at SGD", said[0])
    assert lines == ["epoch 0 codes True loss True"]
    state = torch.load(tmp_path / "out/last.pth")
    plain = torchvision.models.get_model(model, weights=None, num_classes=4)
    plain.load_state_dict(state["model"])
    resume = ["--resume", tmp_path / "out/last.pth", "--epochs", "2", "--model", model]
    said, lines = run(TORCHVISION, tmp_path, folder, *resume)
    assert lines == ["epoch 1 codes True loss True"]
