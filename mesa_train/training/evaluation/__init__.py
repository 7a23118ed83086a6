"""Evaluate a trained model: linear probes, calibration and robustness."""
