"""`mesa-train estimate`."""


def estimate() -> None:
    """estimate"""
