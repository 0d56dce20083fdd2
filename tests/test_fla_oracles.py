"""Recurrences and sparse attention against the naive functions of flash-linear-attention, which nobody here wrote.

    uv run --with fla-core==0.6.0 pytest tests/test_fla_oracles.py

The package is in no dependency group, since transformers would take its kernels where it finds it, also without a GPU.
Its functions compute in fp32, so equality is that of fp32.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from llm.modules.kernels.recurrence import delta_rule, linear_attention, low_rank
from llm.modules.kernels.scan import linear_scan
from llm.modules.recurrent.linear_attention import LinearAttention
from llm.modules.recurrent.retention import Retention
from llm.modules.sparse.chosen import attend_to_chosen
from llm.modules.sparse.native import NativeSparseAttention

PACKAGE = importlib.util.find_spec("fla")
if PACKAGE is None:
    pytest.skip("needs uv run --with fla-core==0.6.0", allow_module_level=True)
SIZE, SELECTED, LENGTH, D_MODEL = 8, 4, 75, 64  # 9 blocks and 3 tokens; a chunk of a recurrence has 64


@pytest.fixture
def naive(monkeypatch):
    """The file of an operation's naive functions, without the rest of its package, which needs Triton."""
    for name in ("fla", "fla.ops", "fla.ops.utils", "fla.ops.utils.pooling"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["fla.ops.utils"].prepare_chunk_offsets = None  # for packed texts, which no test has
    sys.modules["fla.ops.utils.pooling"].mean_pooling = None

    def load(operation):
        path = Path(PACKAGE.submodule_search_locations[0]) / "ops" / operation / "naive.py"
        spec = importlib.util.spec_from_file_location("naive", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def drawn(*widths):
    """A tensor (B, T, H, width) for each width: queries, keys and values of a text."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, LENGTH, 3, width, generator=generator) for width in widths]


def assert_same(found, expected):
    """Outputs and last states."""
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-4)


@torch.no_grad()
def test_linear_attention_with_its_normaliser(naive):
    layer, x, positions = LinearAttention(d_model=D_MODEL, n_heads=4), torch.randn(2, LENGTH, D_MODEL), torch.arange(75)
    q, k, v = layer.project(x, positions)
    expected, _ = naive("linear_attn").naive_recurrent_linear_attn(q, k, v[..., :-1], normalize=True)
    torch.testing.assert_close(layer(x, positions), layer.o_proj(expected.flatten(2)), atol=2e-5, rtol=2e-4)


@torch.no_grad()
def test_retention_with_the_decays_of_its_heads(naive):
    layer, x = Retention(d_model=D_MODEL, n_heads=4, v_head_dim=24), torch.randn(2, LENGTH, D_MODEL)
    q, k, v = layer.project(x, torch.arange(LENGTH))
    found, _ = linear_attention(q, k, v, layer.log_decay(x))
    by_head = [inputs.transpose(1, 2) for inputs in (q * 4, k, v)]  # theirs divides by the root of 16
    expected = naive("retention").naive_retention(*by_head).transpose(1, 2)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-4)


@torch.no_grad()
@pytest.mark.parametrize(("operation", "by_channel"), [("simple_gla", False), ("gla", True)])
def test_gated_linear_attention(naive, operation, by_channel):
    q, k, v, gate, state = drawn(16, 16, 24, 16 if by_channel else 1, 16 * 24)
    log_decay, state = gate.sigmoid().log(), state[:, 0].unflatten(-1, (16, 24))
    function = getattr(naive(operation), f"naive_recurrent_{operation}")
    theirs = log_decay if by_channel else log_decay[..., 0]
    expected = function(q * 4, k, v, theirs, initial_state=state, output_final_state=True)
    assert_same(linear_attention(q, k, v, log_decay, state), expected)


@torch.no_grad()
@pytest.mark.parametrize("operation", ["delta_rule", "gated_delta_rule", "kda"])
def test_delta_rules(naive, operation):
    q, k, v, gate, beta, state = drawn(16, 16, 24, 16 if operation == "kda" else 1, 1, 16 * 24)
    k, beta, state = k / k.norm(dim=-1, keepdim=True), 2 * beta.sigmoid(), state[:, 0].unflatten(-1, (16, 24))
    log_decay = gate.sigmoid().log()
    if operation == "delta_rule":
        log_decay = torch.zeros_like(log_decay)
        by_head = [x.transpose(1, 2) for x in (q * 4, k, v, beta[..., 0])]
        o, last = naive(operation).delta_rule_recurrence(*by_head, initial_state=state)
        expected = o.transpose(1, 2), last
    elif operation == "gated_delta_rule":
        inputs = (q * 4, k, v, beta[..., 0], log_decay[..., 0])
        expected = naive(operation).naive_recurrent_gated_delta_rule(*inputs, None, state, output_final_state=True)
    else:
        inputs = (q * 4, k, v, log_decay, beta[..., 0])
        expected = naive(operation).naive_recurrent_kda(*inputs, None, state, output_final_state=True)
    assert_same(delta_rule(q, k, v, log_decay, beta, state), expected)


@torch.no_grad()
def test_the_recurrence_of_rwkv7(naive):
    q, k, v, a, gate, rate, state = drawn(16, 16, 24, 16, 16, 16, 16 * 24)
    a, log_decay, state = a / a.norm(dim=-1, keepdim=True), gate.sigmoid().log(), state[:, 0].unflatten(-1, (16, 24))
    b = -a * rate.sigmoid()
    by_head = [x.transpose(1, 2) for x in (q * 4, k, v, a, b, log_decay)]
    o, last = naive("generalized_delta_rule/dplr").dplr_recurrence(*by_head, initial_state=state)
    assert_same(low_rank(q, k, v, a, b, log_decay, state), (o.transpose(1, 2), last))


@torch.no_grad()
def test_the_scan_of_griffin(naive):
    inputs, gate, state = (x.flatten(2) for x in drawn(16, 16, 16))
    expected, _ = naive("hgrn").naive_recurrent_hgrn(inputs, gate.sigmoid().log(), state[:, 0])
    torch.testing.assert_close(linear_scan(gate.sigmoid(), inputs, state[:, 0]), expected, atol=2e-5, rtol=2e-4)


@torch.no_grad()
@pytest.mark.parametrize("n_kv_heads", [1, 2])
def test_the_branches_of_native_sparse_attention(naive, n_kv_heads):
    naive = naive("nsa")
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
