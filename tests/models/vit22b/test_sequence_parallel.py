"""Tokens cut over tensor-parallel ranks, as far as one process can see: what the compiler makes of a
block for asynchronous tensor parallelism, and who is refused. Losses: tests/recipes/vit22b."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from mesa_train import wrap
from mesa_train.models.vit22b import sequence_parallel as vit22b_tokens
from mesa_train.models.vit22b.layers import ParallelBlock
from mesa_train.models.vit22b.parallel import shard_heads


@pytest.fixture
def mesh():
    """Two ranks that share heads, of which this is the first; the other is made up."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()
    torch._dynamo.reset()


def shard(mesh):
    """Rank 0's part of a block of width 64 with 4 heads, cut as `shard_heads` cuts a model."""
    block = ParallelBlock(64, 4)
    model = SimpleNamespace(blocks=[block])
    return shard_heads(model, mesh, sequence=True).blocks[0]


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_nccl_available(), reason="the compiler's pass needs NCCL")
@pytest.mark.parametrize("policy", [None, "mesa8"])
def test_the_compiler_joins_gathers_and_scatters_to_matmuls(mesh, policy):
    """PyTorch's own pass, on the graphs of forward and backward that it would get on a GPU: no gather
    and no scatter is left that does not travel with a matmul."""
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes import micro_pipeline_tp, post_grad
    from torch.distributed._symmetric_memory import _test_mode

    recorded = []

    def watched(traced, inputs):
        module = copy.deepcopy(traced)
        post_grad.view_to_reshape(module)
        post_grad.remove_noop_ops(module.graph)
        with _test_mode():
            micro_pipeline_tp.micro_pipeline_tp_pass(module.graph)
        names = [str(n.target) for n in module.graph.nodes if n.op == "call_function"]
        recorded.append(sorted(n for n in names if n.startswith(("symm_mem", "_c10d_functional"))))
        return make_boxed_func(traced)

    block = shard(mesh) if policy is None else wrap(shard(mesh), policy)
    x = torch.zeros(2, 8, 64, requires_grad=True)
    backend = aot_autograd(
        fw_compiler=watched, bw_compiler=watched, decompositions=select_decomp_table
    )
    y = torch.compile(block, backend=backend, fullgraph=True)(x)
    assert y.shape == x.shape
    y.sum().backward()
    joined = [
        "symm_mem.fused_all_gather_matmul.default",
        "symm_mem.fused_matmul_reduce_scatter.default",
    ]
    assert recorded == [joined, joined]


def test_tokens_that_do_not_divide(mesh):
    with pytest.raises(ValueError, match="over 2 ranks must divide the 7 tokens"):
        vit22b_tokens.cut(torch.zeros(1, 7, 4), mesh)


def test_who_cannot_overlap(mesh, monkeypatch):
    with pytest.raises(ValueError, match="needs CUDA devices with peer access, got cpu"):
        vit22b_tokens.overlapped(None, mesh)
    cards = SimpleNamespace(device_type="cuda", size=lambda: 2, get_local_rank=lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="its 2 ranks on one machine; this machine has 1 CUDA"):
        vit22b_tokens.check_overlap(cards)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda device, other: False)
    with pytest.raises(ValueError, match="peer access; device 0 has none to 1"):
        vit22b_tokens.check_overlap(cards)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda device, other: True)
    vit22b_tokens.check_overlap(cards)
