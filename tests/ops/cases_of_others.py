"""Cases of several operators one behind the other, and of those that no row covers."""

import torch
import torch.nn.functional as F
from operator_case import Case, activation, constant, mask_of, parameter, positive


def _joined():
    """Parts with and without a stash, one matmul behind them; norms of a matmul's output."""
    w = parameter(5, 18)
    for name, function in [
        ("cat of activations", lambda x, y, w: F.linear(torch.cat([F.gelu(x), F.silu(y)], -1), w)),
        ("cat by keyword", lambda x, y, w: F.linear(torch.cat((F.gelu(x), y), dim=-1), w)),
        (
            "cat of one stash and a larger part without",
            lambda x, y, w: F.linear(torch.cat([F.gelu(x)[..., :4], y, x[..., 4:]], -1), w),
        ),
        (
            "cat of tokens",
            lambda x, y, w: F.linear(torch.cat([F.gelu(x), F.gelu(y), y[:1]]).repeat(1, 1, 2), w),
        ),
        ("cat used twice", lambda x, y, w: F.linear(_twice(torch.cat([F.gelu(x), y], 2)), w)),
    ]:
        inputs = (activation(3, 4, 9), activation(3, 4, 9), w)
        yield Case(name, function, inputs, eight=0.05, four=0.8)
    inputs = (activation(2, 4, 9), parameter(12, 9), parameter(6))
    for name, norm in [
        ("layer_norm", lambda h, g: F.layer_norm(h, (6,), g)),
        ("rms_norm", lambda h, g: F.rms_norm(h, (6,), g, 1e-6)),
        ("rms_norm over two dims", lambda h, g: F.rms_norm(h, (2, 6), torch.stack([g, g]), 1e-6)),
    ]:
        yield Case(
            f"{name} behind a linear",
            lambda x, w, g, norm=norm: (
                norm(F.linear(x, w).unflatten(-1, (2, 6)), g).transpose(1, 2)
                @ F.gelu(F.linear(x, w)).unflatten(-1, (2, 6)).permute(0, 2, 3, 1)
            ),
            inputs,
            eight=0.06,
            four=1.0,
        )


def _twice(x):
    return x + x.sigmoid() * x


INDEX = torch.tensor([[3, 0, 3, 1, 2], [1, 1, 0, 2, 0], [2, 3, 3, 3, 0]]).unsqueeze(-1)


def _fallback():
    x = activation(3, 4, 9)
    for name, function, inputs in [
        ("exp", torch.exp, (x,)),
        ("exp of a view", lambda x: x.transpose(0, 1).exp(), (x,)),
        ("exp and matmul", lambda x, y: (x.exp() + 1e-4) * 0.5 @ y, (x, activation(3, 9, 5))),
        ("gather", lambda x: x.gather(1, INDEX), (x,)),
        (
            "gather and matmul",
            lambda x, y: y @ x.gather(1, INDEX.repeat(1, 2, 1).expand(-1, -1, 9)).mT,
            (x, activation(3, 4, 9)),
        ),
        ("pow", lambda x: x.pow(3), (x,)),
        ("square", torch.square, (x,)),
        ("sqrt", torch.sqrt, (activation(3, 9, make=positive),)),
        ("div", lambda x, y: x / y, (x, activation(3, 4, 9, make=positive))),
        ("cosine_similarity", lambda x, y: F.cosine_similarity(x, y, -1), (x, x)),
        ("avg_pool2d", lambda x: F.avg_pool2d(x, 3, 2), (activation(2, 3, 7, 7),)),
        ("adaptive_avg_pool2d", lambda x: F.adaptive_avg_pool2d(x, 1), (activation(2, 3, 7, 7),)),
        ("where", lambda x, y: torch.where(x > y, x * x, y), (x, x)),
        (
            "masked_fill",
            lambda x, m: x.masked_fill(m, -1.0),
            (x, constant(3, 4, 9, make=mask_of, cast=False)),
        ),
        (
            "bilinear",
            F.bilinear,
            (activation(4, 5), activation(4, 6), parameter(3, 5, 6), parameter(3)),
        ),
        ("std", lambda x: x.std(-1), (x,)),
        ("norm", lambda x: torch.linalg.vector_norm(x, dim=-1), (x,)),
        ("sort", lambda x: x.sort(-1)[0], (x,)),
        ("cumprod", lambda x: x.cumprod(-1), (activation(3, 5, make=positive),)),
        ("index", lambda x: x[torch.tensor([0, 2, 2])].square(), (x,)),
        ("cat", lambda x, y: torch.cat([x, y], -1).square(), (x, x)),
        ("pad reflect", lambda x: F.pad(x, (2, 1), mode="reflect").square(), (x,)),
        (
            "interpolate",
            lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear"),
            (activation(2, 3, 4, 4),),
        ),
        ("amax", lambda x: x.amax(-1), (x,)),
        ("max of all", lambda x: x.max() * x.min(), (x,)),
        ("maximum", torch.maximum, (x, x)),
        ("clamp", lambda x: x.clamp(-0.5, 0.5), (x,)),
        ("abs", torch.abs, (x,)),
        (
            "views",
            lambda x: x.transpose(0, 1).flip(0).roll(1, 0).flatten(1).unflatten(1, (3, 9)).exp(),
            (x,),
        ),
    ]:
        # Division and the powers magnify what is small.
        loose = {"eight": 0.1, "four": 0.4}
        operators = {
            "exp",
            "exp of a view",
            "exp and matmul",
            "gather",
            "gather and matmul",
            "views",
            "where",
            "amax",
            "max of all",
            "clamp",
        }
        yield Case(name, function, inputs, fallback=name not in operators, **loose)


def _chosen():
    """Elements chosen by their size."""
    image = (activation(2, 3, 7, 6),)
    volume = (activation(2, 3, 5, 6, 4),)
    for name, function, inputs in [
        ("max_pool2d", lambda x: F.max_pool2d(x, 2), image),
        ("max_pool2d overlapping", lambda x: F.max_pool2d(x, 3, 2, 1), image),
        (
            "max_pool2d of tuples",
            lambda x: F.max_pool2d(x, (3, 2), (1, 2), (1, 0), (1, 2), ceil_mode=True),
            image,
        ),
        ("max_pool2d unbatched", lambda x: F.max_pool2d(x, 3, 1), (activation(3, 7, 6),)),
        ("max_pool2d of a wide window", lambda x: F.max_pool2d(x, 17), (activation(1, 2, 17, 34),)),
        ("max_pool3d", lambda x: F.max_pool3d(x, 3, 2, 1), volume),
        (
            "relu_, max_pool2d, conv2d",
            lambda x, k: F.conv2d(
                F.max_pool2d(F.relu_(F.batch_norm(x, None, None, training=True)), 3, 2, 1), k
            ),
            (*image, parameter(2, 3, 2, 2)),
        ),
        ("max along a dim", lambda x: x.max(dim=1)[0], image),
        ("torch.max along a dim", lambda x: torch.max(x, -1, keepdim=True).values, image),
        ("min along a dim", lambda x: x.min(1)[0], image),
        (
            "max along a dim, linear",
            lambda x, w: F.linear(F.gelu(x).max(1).values, w),
            (*image, parameter(4, 6)),
        ),
        ("amax of all", lambda x: F.gelu(x).amax(), image),
        (
            "amax, linear",
            lambda x, w: F.linear(F.gelu(x).amax(1), w),
            (*image, parameter(4, 6)),
        ),
    ]:
        yield Case(name, function, inputs, eight=0.05, four=0.8)


OTHERS = [*_joined(), *_fallback(), *_chosen()]
