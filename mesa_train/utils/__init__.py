"""Helpers: text formats, one-line errors, YAML, records. They do not use policies or models."""
