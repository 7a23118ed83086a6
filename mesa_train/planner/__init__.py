"""Plan a policy that fits a memory budget: candidates, models of memory, time and error, an integer program."""
