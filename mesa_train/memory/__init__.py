"""Where the memory goes: what a forward keeps for its backward, counted and compared."""
