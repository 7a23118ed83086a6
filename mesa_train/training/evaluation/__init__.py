"""Evaluation of a trained model: linear probes, calibration and robustness."""
