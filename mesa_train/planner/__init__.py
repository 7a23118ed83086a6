"""Plan a policy that fits a memory budget: an integer program over memory, time and error."""
