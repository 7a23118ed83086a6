"""`mesa-train run` with the training code of libraries, untouched: their loops find, wrap and train."""

import importlib.util
import json
import re

import forked
import pytest
from limits import HUNG_S

# open_clip's own training program, on pairs that it makes up itself.
OPEN_CLIP = """
import json, pathlib, sys
import open_clip
from open_clip_train.main import main

folder = pathlib.Path(sys.argv[1])
open_clip.add_model_config(folder / "tiny.json")
main(["--model", "tiny", "--dataset-type", "synthetic", "--train-num-samples", "16", "--batch-size", "8",
      "--epochs", "1", "--workers", "0", "--device", "cpu", "--precision", "fp32", "--logs", str(folder)])
"""
TINY = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
# lightly-train: one call, which trains with Lightning.
LIGHTLY = """
import pathlib, sys
import numpy as np
from PIL import Image
import lightly_train

folder = pathlib.Path(sys.argv[1])
(folder / "images").mkdir()
for n in range(8):
    pixels = np.random.default_rng(n).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "images" / f"{n}.png")
lightly_train.pretrain(
    out=folder / "out", data=folder / "images", model="timm/vit_tiny_patch16_224", method="dino",
    epochs=1, batch_size=4, num_workers=0, accelerator="cpu", devices=1, precision="32-true",
    model_args={"img_size": 64, "depth": 2, "dynamic_img_size": True},
    transform_args={"image_size": (64, 64)},
)
"""
# The shape of torchvision's reference script for detection: groups of parameters, warm-up, a dict of losses.
TORCHVISION = """
import torch, torchvision
import mesa_train

model = torchvision.models.detection.fcos_resnet50_fpn(
    weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=64)
groups = torchvision.ops._utils.split_normalization_params(model)
optimizer = torch.optim.SGD(
    [{"params": p, "weight_decay": w} for p, w in zip(groups, (0.0, 1e-4)) if p], lr=1e-3)
warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 1e-3, total_iters=2)
images = [torch.rand(3, 64, 64) for _ in range(2)]
boxes = torch.tensor([[4.0, 4, 40, 50]])
for _ in range(2):
    losses = model(images, [{"boxes": boxes, "labels": torch.tensor([1])}] * 2)
    loss = sum(losses.values())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    warmup.step()
assert loss.isfinite()
print("codes:", any("8 bits" in row.how for row in mesa_train.coverage(model).rows))
"""
# The pieces of timm's train.py: factory, layer decay, clipping scaler, averaged weights, schedule.
TIMM = """
import torch, timm
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, NativeScaler
import mesa_train

model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5, drop_path_rate=0.1)
optimizer = create_optimizer_v2(model, opt="lamb", lr=1e-3, layer_decay=0.9)
average = ModelEmaV3(model, decay=0.9)
scaler = NativeScaler("cpu")
schedule, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=2)
for epoch in range(2):
    with torch.autocast("cpu", torch.float16):
        loss = torch.nn.functional.cross_entropy(model(torch.randn(32, 3, 32, 32)), torch.arange(32) % 5)
    scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters())
    optimizer.zero_grad()
    average.update(model)
    schedule.step(epoch + 1)
print("codes:", any("8 bits" in row.how for row in mesa_train.coverage(model).rows))
"""
SCRIPTS = {
    "open_clip": ("open_clip_train", OPEN_CLIP, "CLIP", "AdamW"),
    "lightly-train": ("lightly_train", LIGHTLY, "DINO", "SGD"),
    "torchvision": ("torchvision", TORCHVISION, "FCOS", "SGD"),
    "timm": ("timm", TIMM, "VisionTransformer", "Lamb"),
}


@pytest.mark.slow
@pytest.mark.parametrize("library", SCRIPTS)
@pytest.mark.compatibility("mesa-train run", "{library}")
def test_a_librarys_training_runs_untouched(library, tmp_path):
    package, source, model, optimizer = SCRIPTS[library]
    # Not imported here: lightly_train changes a global setting of Pillow.
    for needed in (package, *(["webdataset"] if library == "open_clip" else [])):
        if not importlib.util.find_spec(needed):
            pytest.skip(f"needs {needed}")
    if library == "open_clip":
        (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    script = tmp_path / "train.py"
    script.write_text(source)
    command = ["-m", "mesa_train.cli", "run", script, tmp_path]
    done = forked.run(command, cwd=tmp_path, timeout=HUNG_S)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = re.findall(r"mesa-train run: (.*)", done.stderr)
    assert len(lines) == 1
    assert re.fullmatch(
        rf"wrapped {model} \(.* parameters, \d+ modules\), found at {optimizer}", lines[0]
    )
    if "codes:" in source:
        assert "codes: True" in done.stdout
