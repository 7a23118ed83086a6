"""Training of any classifier through Accelerate: configuration, dry run, training run and fit."""
