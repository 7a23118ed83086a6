"""Training steps as CUDA graphs: checks, static gradients, the optimizer's part, the step itself.

`step.py` has the public function. Nothing here is imported before the first use.
"""
