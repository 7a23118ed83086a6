"""Training of ViT-22B with FSDP2 or ZeRO-3, or on one card with QLoRA."""
