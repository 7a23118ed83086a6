"""What the recipes and experiments share: data, the training loop, records, progress, plots.

Nothing here is needed to use mesa_train, and `import mesa_train` does not load it.
"""
