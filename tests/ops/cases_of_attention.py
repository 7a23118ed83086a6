"""Cases of attention and softmax."""

import torch
import torch.nn.functional as F
from operator_case import Case, activation, constant, mask_of, of_module, parameter
from torch import nn


def _attention():
    sdpa = F.scaled_dot_product_attention
    qkv = (activation(2, 3, 7, 8), activation(2, 3, 5, 8), activation(2, 3, 5, 8))
    same = (activation(2, 3, 6, 8),) * 3
    # Softmax's arguments are exponentiated: at 4 bits an unscaled random q and k lose most.
    loose = {"four": 0.8, "eight": 0.05}
    yield Case("attention", sdpa, qkv, **loose)
    yield Case(
        "attention of a packed qkv",
        lambda x: sdpa(*x.unbind(0)),
        (activation(3, 2, 3, 6, 8),),
        **loose,
    )
    yield Case(
        "attention of one tensor", lambda x: sdpa(x, x, x), (activation(2, 3, 6, 8),), **loose
    )
    yield Case("attention causal", lambda q, k, v: sdpa(q, k, v, is_causal=True), same, **loose)
    yield Case("attention scale", lambda q, k, v: sdpa(q, k, v, scale=0.3), qkv, **loose)
    yield Case(
        "attention bool mask",
        lambda q, k, v, m: sdpa(q, k, v, m),
        (*qkv, constant(2, 1, 7, 5, make=mask_of, cast=False)),
        **loose,
    )
    yield Case(
        "attention float mask", lambda q, k, v, m: sdpa(q, k, v, m), (*qkv, constant(7, 5)), **loose
    )
    yield Case(
        "attention mask with a gradient",
        lambda q, k, v, m: sdpa(q, k, v, m),
        (*qkv, parameter(1, 3, 7, 5)),
        **loose,
    )
    yield Case(
        "attention mask with a gradient, scale",
        lambda q, k, v, m: sdpa(q, k, v, m, scale=0.5),
        (*qkv, activation(2, 3, 7, 5)),
        **loose,
    )
    yield Case(
        "attention with a mask of two factors",
        lambda q, k, v, rows, columns: sdpa(q, k, v, (rows + columns).reshape(2, 1, 5, 64)),
        (
            *(activation(2, 1, 5, 4), activation(2, 1, 64, 4), activation(2, 1, 64, 4)),
            *(activation(2, 1, 5, 8, 1), activation(2, 1, 5, 1, 8)),
        ),
        **loose,
    )
    yield Case("attention dropout", lambda q, k, v: sdpa(q, k, v, dropout_p=0.3), qkv, **loose)
    yield Case(
        "attention dropout and mask",
        lambda q, k, v, m: sdpa(q, k, v, m, dropout_p=0.3),
        (*qkv, parameter(3, 7, 5)),
        **loose,
    )
    yield Case(
        "attention GQA",
        lambda q, k, v: sdpa(q, k, v, enable_gqa=True),
        (activation(2, 4, 6, 8), activation(2, 2, 6, 8), activation(2, 2, 6, 8)),
        **loose,
    )
    yield Case(
        "attention 3-D",
        sdpa,
        (activation(3, 7, 8), activation(3, 5, 8), activation(3, 5, 8)),
        **loose,
    )
    yield Case(
        "attention 3-D with a mask for each row",
        lambda q, k, v, m: sdpa(q, k, v, m),
        (activation(3, 7, 8), activation(3, 5, 8), activation(3, 5, 8), parameter(3, 7, 5)),
        **loose,
    )
    yield Case("attention 5-D", sdpa, (activation(2, 2, 3, 4, 8),) * 3, **loose)
    yield Case(
        "attention values of another width",
        sdpa,
        (activation(2, 3, 7, 8), activation(2, 3, 5, 8), activation(2, 3, 5, 4)),
        **loose,
    )
    yield Case(
        "attention heads aside",
        lambda x: (
            sdpa(*x.view(2, 6, 3, 3, 8).permute(2, 0, 3, 1, 4)).transpose(1, 2).reshape(2, 6, 24)
        ),
        (activation(2, 6, 72),),
        **loose,
    )
    yield Case(
        "attention of constant q, k",
        sdpa,
        (constant(2, 3, 6, 8), constant(2, 3, 6, 8), activation(2, 3, 6, 8)),
        **loose,
    )
    yield Case(
        "attention by hand",
        lambda q, k, v: ((q @ k.transpose(-2, -1)) * 8**-0.5).softmax(-1) @ v,
        qkv,
        **loose,
    )
    for weights in (True, False):
        yield of_module(
            f"MultiheadAttention need_weights={weights}",
            lambda: nn.MultiheadAttention(12, 3, batch_first=True),
            activation(2, 5, 12),
            call=lambda m, x, weights=weights: m(x, x, x, need_weights=weights),
            **loose,
        )
    yield of_module(
        "MultiheadAttention key padding, dropout",
        lambda: nn.MultiheadAttention(12, 3, dropout=0.2),
        activation(5, 2, 12),
        constant(2, 5, make=lambda *s: ~mask_of(*s), cast=False),
        call=lambda m, x, mask: m(x, x, x, key_padding_mask=mask),
        **loose,
    )
    for norm_first in (True, False):
        yield of_module(
            f"TransformerEncoderLayer norm_first={norm_first}",
            lambda norm_first=norm_first: nn.TransformerEncoderLayer(
                12, 3, 20, dropout=0.1, activation="gelu", norm_first=norm_first, batch_first=True
            ),
            activation(2, 5, 12),
            **loose,
        )


def _softmax():
    x = (activation(3, 4, 9),)
    yield Case("torch.softmax", lambda x: torch.softmax(x, -1), x)
    yield Case("F.softmax", lambda x: F.softmax(x, dim=1), x)
    yield Case("Tensor.softmax", lambda x: x.softmax(0), x)
    yield Case("softmax in a wider dtype", lambda x: x.softmax(-1, dtype=torch.float64), x)
    yield Case("softmax and matmul", lambda x, y: x.softmax(-1) @ y, (*x, activation(3, 9, 5)))


ATTENTION = [*_attention(), *_softmax()]
