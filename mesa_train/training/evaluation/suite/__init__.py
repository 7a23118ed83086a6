"""All evaluations of one frozen model in one report (recipes/evaluate)."""
