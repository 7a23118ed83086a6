"""Small models of each kind for the tests of torch.compile, in two parts with a pause in between, and how their
steps are compared."""

import timm
import torch
import torch.nn.functional as F
from torch import nn


class Functional(nn.Module):
    """Attention as Hugging Face's models write it: a function looked up in a table, scores in float32."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.out, self.up, self.down = nn.Linear(32, 32), nn.Linear(32, 64), nn.Linear(64, 32)
        self.attend = eager_attention

    def forward(self, x):
        shape = (*x.shape[:-1], 2, 16)
        h = self.norm(x)
        q, k, v = [part(h).view(shape).transpose(1, 2) for part in (self.q, self.k, self.v)]
        attended, _ = self.attend(self, q, k, v, scaling=0.25, dropout=0.0)
        x = x + self.out(attended.reshape(*x.shape[:-1], -1).contiguous())
        return x + self.down(F.gelu(self.up(F.layer_norm(x, (32,)))))


def eager_attention(module, query, key, value, scaling, dropout):
    weights = torch.matmul(query, key.transpose(-1, -2)) * scaling
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def _vit():
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=32, depth=1, num_heads=2, num_classes=0
    )
    return model, nn.Linear(32, 5), torch.randn(4, 3, 16, 16)


def _convnet():
    first = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16),
        nn.GroupNorm(4, 16),
        nn.SiLU(),
    )
    last = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
    return first, last, torch.randn(4, 3, 16, 16)


def _functional():
    return Functional(), nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 5)), torch.randn(4, 17, 32)


def _encoder():
    layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True, norm_first=True)
    first = nn.TransformerEncoder(layer, 1, nn.LayerNorm(32), enable_nested_tensor=False)
    return first, nn.Linear(32, 5), torch.randn(4, 17, 32)


def _mlp():
    return (
        nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU()),
        nn.Linear(64, 5),
        torch.randn(4, 17, 32),
    )


_KINDS = {"vit": _vit, "convnet": _convnet, "functional": _functional, "encoder": _encoder}
KINDS = list(_KINDS)
# Traced in a fifth of the others' time, for what does not depend on the model.
_KINDS["mlp"] = _mlp


class Parts(nn.Module):
    """`last(pause(first(x)))`."""

    def __init__(self, first, last, pause):
        super().__init__()
        self.first, self.last, self.pause = first, last, pause

    def forward(self, x):
        return self.last(self.pause(self.first(x)))


def go_on(x):
    return x


def made(kind, pause=go_on):
    """(model, inputs), the same each time."""
    torch.manual_seed(0)
    first, last, x = _KINDS[kind]()
    return Parts(first, last, pause), x


def step(function, model, *inputs):
    """(output, flat gradients) of one step."""
    model.zero_grad()
    output = function(*inputs)
    output.float().square().sum().backward()
    return output.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


def kept(function, *inputs):
    """Bytes that one call keeps, other than parameters, when it is not the first."""
    storages = {}

    def pack(tensor):
        if not isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter):
            storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    function(*inputs)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function(*inputs)
    return sum(s.nbytes() for s in storages.values())
