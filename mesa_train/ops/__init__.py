"""The operators: one file each, opened by what it keeps for the backward, what it rebuilds, and
what that costs."""
