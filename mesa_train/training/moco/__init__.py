"""Self-supervised training by MoCo v3 on the shared loop (recipes/mocov3)."""
