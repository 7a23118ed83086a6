"""Training code that recipes and experiments share: data, training loop, records, progress, plots.

mesa_train works without this package, and `import mesa_train` does not load it.
"""
