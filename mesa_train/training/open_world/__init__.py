"""Training of open-world detectors: tasks, splits, replay, evaluation. Scripts in `recipes/open_world`."""
