"""Random seeds of tests.

`torch.manual_seed` seeds every device. Where CUDA is not initialised, each call formats three stack traces. Under
pytest this takes 2 ms, which is half of the time of an operator's test.
"""

import torch

# Seeds torch's generators: of all devices if there is an accelerator, else that of the CPU.
seed_torch = (
    torch.manual_seed if torch.accelerator.is_available() else torch.default_generator.manual_seed
)
