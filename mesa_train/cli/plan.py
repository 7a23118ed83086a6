"""`mesa-train plan`."""


def plan() -> None:
    """plan"""
