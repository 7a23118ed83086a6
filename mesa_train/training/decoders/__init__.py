"""Decoders for segmentation and depth on the maps of any ViT (recipes/decoders)."""
