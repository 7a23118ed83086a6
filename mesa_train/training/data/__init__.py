"""Training images: sources, decoding, labels and loaders."""
