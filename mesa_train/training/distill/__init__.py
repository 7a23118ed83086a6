"""Distillation of any classifier into any timm model by function matching (recipes/distill)."""
