"""What the tests of checkpoints share."""

import pytest
from integration_models import POLICIES
from torch import nn
from torch.utils.checkpoint import checkpoint

KINDS = pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
PRESETS = pytest.mark.parametrize("preset", POLICIES)


def module_route(reentrant):
    return lambda block, x: checkpoint(block, x, use_reentrant=reentrant)


class Under(nn.Module):
    """A module that runs under a mode."""

    def __init__(self, inner, mode):
        super().__init__()
        self.inner, self.mode = inner, mode

    def forward(self, x):
        with self.mode:
            return self.inner(x)
