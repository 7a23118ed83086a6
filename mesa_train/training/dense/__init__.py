"""Training of detectors and segmenters: data sets of folders, transforms, evaluation, runs."""
