"""Small dense models with images and targets of random boxes."""

import copy

import torch
from torchvision.models.detection.faster_rcnn import TwoMLPHead

from mesa_train.models.dense import faster_rcnn, mask_rcnn, retinanet, semantic_fpn
from mesa_train.models.dense.roi_heads import BoxPredictor

SIZES = ((96, 128), (90, 100))
BUILDERS = {"retinanet": retinanet, "faster_rcnn": faster_rcnn, "mask_rcnn": mask_rcnn}


def detector(name, backbone="litv2_tiny", **options):
    """A detector of 5 classes for images of about 96 x 128 pixels, with few regions and a narrow head."""
    model = BUILDERS[name](backbone, 5, **{"min_size": 96, "max_size": 128} | options)
    if name != "retinanet":
        model.rpn._post_nms_top_n = {"training": 40, "testing": 20}
        heads = model.roi_heads
        heads.fg_bg_sampler.batch_size_per_image = 16
        heads.box_head = TwoMLPHead(256 * 7 * 7, 64)
        scores = heads.box_predictor.cls_score.out_features
        heads.box_predictor = BoxPredictor(
            64, scores, heads.box_predictor.bbox_pred.out_features // 4
        )
    return model.train()


def segmenter(backbone="litv2_tiny", classes=7):
    return semantic_fpn(backbone, classes, dropout=0.0).train()


def images(sizes=SIZES):
    return [torch.rand(3, *size) for size in sizes]


def targets(counts, sizes=SIZES, first_label=0):
    """Targets with a number of boxes for each image. Masks are the boxes' left halves."""
    result = []
    for count, (height, width) in zip(counts, sizes, strict=True):
        corner = torch.rand(count, 2) * torch.tensor([width, height]) * 0.5
        side = torch.rand(count, 2) * torch.tensor([width, height]) * 0.4 + 4
        boxes = torch.cat([corner, corner + side], 1)
        masks = torch.zeros(count, height, width, dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y1:y2, x1 : (x1 + x2) // 2 + 1] = 1
        labels = torch.randint(first_label, first_label + 5, (count,))
        result.append({"boxes": boxes, "labels": labels, "masks": masks})
    return result


class Step:
    """Calling it gives (losses, all gradients as one vector, buffers) from one state and seed."""

    def __init__(self, model, *inputs):
        self.model, self.inputs = model, inputs
        self.state = copy.deepcopy(model.state_dict())

    def __call__(self):
        self.model.load_state_dict(self.state)
        self.model.zero_grad()
        torch.manual_seed(1)
        losses = self.model(*self.inputs)
        sum(losses.values()).backward()
        gradients = [p.grad.flatten() for p in self.model.parameters() if p.grad is not None]
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        return {k: v.detach() for k, v in losses.items()}, torch.cat(gradients), buffers
