"""Formatting, one-line errors, YAML and records of measurements. Nothing here knows of policies or models."""
