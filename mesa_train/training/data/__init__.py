"""Images for training: sources, decoding, labels and loaders."""
