"""Detection and segmentation on torchvision's detectors: RetinaNet, Faster and Mask R-CNN, Semantic FPN.

The backbone is a model of this package (LITv1, LITv2), a timm or Hugging Face model with maps, or a
plain ViT (`plain_vit`). Rules follow the detectors of LITv2's authors; `Conventions` has
torchvision's as options.
"""

from .conventions import Conventions as Conventions
from .frozen import freeze_batch_norms as freeze_batch_norms
from .frozen import freeze_stages as freeze_stages
from .official import from_official as from_official
from .plain_vit import plain_vit as plain_vit
from .rcnn import faster_rcnn as faster_rcnn
from .rcnn import mask_rcnn as mask_rcnn
from .retinanet import retinanet as retinanet
from .semantic_fpn import semantic_fpn as semantic_fpn
