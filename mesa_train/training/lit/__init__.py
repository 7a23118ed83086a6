"""Zero-shot classification by locked-image tuning (LiT) on the shared loop (recipes/lit)."""
