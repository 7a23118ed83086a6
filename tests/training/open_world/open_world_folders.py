"""Small folders in VOC's and COCO's formats. Pictures are noise; objects have one box."""

import json
from xml.etree import ElementTree

import numpy as np
from PIL import Image

SIZE = 64


def voc_folder(folder, lists):
    """Pictures by split, each a list of (class, difficult)."""
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for split, pictures in lists.items():
        for stem, objects in pictures.items():
            root = ElementTree.Element("annotation")
            size = ElementTree.SubElement(root, "size")
            for side in ("width", "height"):
                ElementTree.SubElement(size, side).text = str(SIZE)
            for name, difficult in objects:
                element = ElementTree.SubElement(root, "object")
                ElementTree.SubElement(element, "name").text = name
                ElementTree.SubElement(element, "difficult").text = str(difficult)
                box = ElementTree.SubElement(element, "bndbox")
                for corner, value in (("xmin", 1), ("ymin", 1), ("xmax", 20), ("ymax", 20)):
                    ElementTree.SubElement(box, corner).text = str(value)
            ElementTree.ElementTree(root).write(folder / f"Annotations/{stem}.xml")
            picture(folder / f"JPEGImages/{stem}.jpg")
        (folder / f"ImageSets/Main/{split}.txt").write_text("\n".join(pictures))
    return folder


def coco_folder(folder, lists):
    """Pictures by split, each a list of (class, crowd)."""
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    names = ["person", "airplane", "truck", "frisbee", "bed", "kite"]
    for split, pictures in lists.items():
        (folder / split).mkdir()
        images, annotations = [], []
        for number, (stem, objects) in enumerate(pictures.items()):
            picture(folder / split / f"{stem}.jpg")
            images.append({"id": number, "file_name": f"{stem}.jpg", "height": SIZE, "width": SIZE})
            for name, crowd in objects:
                entry = {"id": len(annotations) + 1, "image_id": number, "iscrowd": crowd}
                entry |= {"category_id": names.index(name) + 1, "bbox": [0, 0, 20, 20], "area": 400}
                annotations.append(entry)
        categories = [{"id": i + 1, "name": name} for i, name in enumerate(names)]
        values = {"images": images, "annotations": annotations, "categories": categories}
        (folder / f"annotations/instances_{split}.json").write_text(json.dumps(values))
    return folder


def picture(path):
    random = np.random.default_rng(len(path.stem) + ord(path.stem[-1]))
    Image.fromarray(random.integers(0, 255, (SIZE, SIZE, 3), np.uint8)).save(path)
