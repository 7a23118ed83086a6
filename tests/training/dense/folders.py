"""Small data sets on disk, and changes that a stranger's annotations could have."""

import json

import numpy as np
from PIL import Image

from mesa_train.training.dense.composed import write_coco

SIZE = (64, 80)
OPTIONS = {"size": SIZE, "sides": (16, 30), "objects": (1, 3), "digits": range(3)}


def coco_folder(folder, train=4, val=2):
    """A folder of digits in COCO's format."""
    return write_coco(folder, {"train": train, "val": val}, **OPTIONS)


def annotations(folder, split="train"):
    return folder / "annotations" / f"instances_{split}.json"


def change(folder, edit, split="train"):
    """Apply `edit` to the annotations in place."""
    file = annotations(folder, split)
    values = json.loads(file.read_text())
    edit(values)
    file.write_text(json.dumps(values))


def rectangle(box):
    """A polygon around a box [x, y, width, height]."""
    x, y, width, height = box
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


def strange(values):
    """What the annotations of strangers have: gaps in ids, a crowd region, flat and far boxes, polygons,
    run lengths as lists, a picture without objects."""
    for entry in [*values["categories"], *values["annotations"]]:
        key = "category_id" if "category_id" in entry else "id"
        entry[key] = {1: 7, 2: 18, 3: 90}[entry[key]]
    first = values["images"][0]["id"]
    height, width = SIZE
    counts = [10, 20, height * width - 30]
    region = {"size": [height, width], "counts": counts}
    made = [
        ([4, 4, 40, 40], {"iscrowd": 1, "segmentation": region}),
        ([5, 5, 0, 12], {}),
        ([2, 2, 9, 0], {"area": 0}),
        ([width + 5, 3, 9, 9], {}),
        ([60.5, 40.25, 40, 20], {}),
    ]
    for number, (box, more) in enumerate(made):
        entry = {"id": 9000 + number, "image_id": first, "category_id": 18, "bbox": box}
        values["annotations"].append({**entry, "segmentation": rectangle(box), **more})
    values["images"].append({"id": 999, "file_name": "empty.png", "height": height, "width": width})


def strange_folder(folder):
    """`coco_folder` with strange annotations, a grey picture and one of 16 bits."""
    coco_folder(folder)
    for split in ("train", "val"):
        change(folder, strange, split)
        Image.fromarray(np.full(SIZE, 90, np.uint8)).save(folder / split / "empty.png")
        deep = np.linspace(0, 65535, SIZE[0] * SIZE[1]).astype(np.uint16).reshape(SIZE)
        Image.fromarray(deep).save(folder / split / "000001.png")
        path = folder / split / "000002.png"
        Image.open(path).convert("L").save(path)
    return folder
