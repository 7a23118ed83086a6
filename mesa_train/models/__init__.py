"""Models of our own; importing this package registers them with timm."""

from . import vit22b as vit22b
