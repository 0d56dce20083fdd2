"""Native Sparse Attention against functions that nobody here wrote: the naive ones of flash-linear-attention.

    uv run --with fla-core==0.6.0 pytest tests/test_sparse_oracles.py

The package is in no dependency group, since transformers would take its kernels where it finds it, also without a GPU.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from llm.modules.sparse.chosen import attend_to_chosen
from llm.modules.sparse.native import NativeSparseAttention

PACKAGE = importlib.util.find_spec("fla")
if PACKAGE is None:
    pytest.skip("needs uv run --with fla-core==0.6.0", allow_module_level=True)
SIZE, SELECTED, LENGTH, D_MODEL = 8, 4, 75, 64  # 9 blocks and 3 tokens


@pytest.fixture
def naive(monkeypatch):
    """The file of the naive functions, without the rest of its package, which needs Triton."""
    for name in ("fla", "fla.ops", "fla.ops.utils", "fla.ops.utils.pooling"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["fla.ops.utils"].prepare_chunk_offsets = None  # for packed texts, which no test has
    sys.modules["fla.ops.utils.pooling"].mean_pooling = None
    path = Path(PACKAGE.submodule_search_locations[0]) / "ops" / "nsa" / "naive.py"
    spec = importlib.util.spec_from_file_location("naive_nsa", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
@pytest.mark.parametrize("n_kv_heads", [1, 2])
def test_the_branches_of_nsa_are_those_of_flash_linear_attention(naive, n_kv_heads):
    torch.manual_seed(0)
    layer = NativeSparseAttention(
        d_model=D_MODEL, n_heads=4, n_kv_heads=n_kv_heads, compress_size=SIZE, compress_stride=SIZE, select_size=SIZE,
        n_selected=SELECTED, window_size=SIZE,
    )  # fmt: skip
    n_blocks, shape = -(-LENGTH // SIZE), (n_kv_heads, D_MODEL // 4)
    q, k, v = (torch.randn(2, LENGTH, *heads) for heads in ((4, D_MODEL // 4), shape, shape))
    summary_k, summary_v = torch.randn(2, 2, n_blocks, *shape)  # theirs have one of the unfinished block, too
    positions, finished = torch.arange(LENGTH).expand(2, -1), LENGTH // SIZE

    expected, _ = naive.naive_nsa_compression(q, summary_k, summary_v, SIZE, layer.scale)
    found, importance = layer.look_at_summaries(
        q.transpose(1, 2), summary_k[:, :finished], summary_v[:, :finished], positions
    )
    torch.testing.assert_close(found.transpose(1, 2), expected)

    blocks = naive.naive_nsa_topk(q, summary_k, SELECTED, SIZE, layer.scale)  # (B, T, H_kv, n), -1: none
    index, shown = layer.select(importance, positions, LENGTH)
    for b, g, t in ((b, g, t) for b in range(2) for g in range(n_kv_heads) for t in range(LENGTH)):
        theirs = {j * SIZE + i for j in blocks[b, t, g].tolist() if j >= 0 for i in range(SIZE) if j * SIZE + i <= t}
        assert set(index[b, g, t][shown[b, g, t]].tolist()) == theirs

    expected = naive.naive_nsa_selection(q, k, v, blocks, SIZE, layer.scale)
    found = attend_to_chosen(q.transpose(1, 2), k, v, index.clamp(max=LENGTH - 1), shown, layer.scale)
    torch.testing.assert_close(found.transpose(1, 2), expected)
