from graph_recorder import capturable_on_cpu, record  # noqa: F401  fixtures
