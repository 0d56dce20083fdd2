"""Costs by formula against what torch counts, what the mask shows and what the model holds."""

import copy
import re
import sys
from dataclasses import replace

import pytest
import torch
from conftest import tiny_model
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from training import ROOT

from llm.analysis.accounting import describe, forward_flops, own_flops, sharded_memory, summary, units
from llm.hub.maps import SIZES
from llm.models import MODELS
from llm.models.baseline import Baseline
from llm.models.case_studies.llama import Llama
from llm.modules import masks
from llm.modules.attention.latent import LatentAttention
from llm.modules.attention.sinks import SinkAttention
from llm.modules.kernels import chunks
from llm.modules.masks import mean_keys
from llm.modules.recurrent import core, mamba
from llm.modules.recurrent.delta import GatedDeltaNet
from llm.modules.recurrent.mamba2 import Mamba2
from llm.modules.recurrent.retention import Retention
from llm.modules.recurrent.rg_lru import RGLRU
from llm.modules.recurrent.short_convolution import ShortConvolution

T = 48


def dense(model):
    """A copy whose masks hide nothing from the formula: what is counted when scores are computed first, then masked."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(getattr(module, "mask", None), masks.Mask):
            module.mask = masks.everything
    return model


def counted(model, run) -> int:
    def flops(q, k, v, *_, **__):
        return 2 * q[:-1].numel() * k[2] * (q[3] + v[3])

    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # which torch 2.11 does not count
    with FlopCounterMode(display=False, custom_mapping={} if fused in flop_registry else {fused: flops}) as counter:
        run(model)
    return counter.get_total_flops()


def padding_flops(model) -> float:
    """Per token, what fused paths add: for attention sinks 8 channels and one key to hide them in, for latent attention
    values as wide as its keys."""
    latent = [module for module in model.blocks.modules() if isinstance(module, LatentAttention)]
    padded = sum(2 * m.n_heads * max(0, sum(m.q_split) - m.expanded_split[1]) * T for m in latent)
    sinks = [module for module in model.modules() if isinstance(module, SinkAttention)]
    extra = (sink.q_proj.out_features for sink in sinks)
    heads = (sink.q_proj.out_features // sink.head_dim for sink in sinks)
    return padded + sum(4 * ((e + 8 * h) * (T + 1) - e * T) for e, h in zip(extra, heads, strict=True))


def recurrent_flops(model) -> float:
    """Per token, what recurrences take: sums and products of which torch counts none. It counts short convolutions."""
    mixers = [m for m in model.modules() if type(m).__module__.startswith("llm.modules.recurrent")]
    parts = [m for m in mixers if hasattr(m, "flops") and not isinstance(m, ShortConvolution)]
    gates = [p for part in parts if isinstance(part, RGLRU) for p in (part.recurrent_weight, part.input_weight)]
    return sum(part.flops(T) for part in parts) - sum(2 * weight.numel() for weight in gates)  # products, for torch too


@pytest.fixture
def loops(monkeypatch):
    """Recurrences as their definitions, without a matrix product: chunks do other work, and more of it."""
    for name in ("linear_attention", "delta_rule", "low_rank"):
        monkeypatch.setattr(chunks, f"chunked_{name}", with_a_key_for_each_head(getattr(core, f"explicit_{name}")))
    monkeypatch.setattr(mamba, "selective_scan", lambda u, *_: (u, None))


def test_a_recurrence_costs_one_product_for_each_time_the_state_is_read_or_written():
    sizes = dict(d_model=512, n_heads=4, head_dim=64, v_head_dim=128)
    assert Retention(**sizes).flops(T) == 4 * 4 * 64 * 128
    assert GatedDeltaNet(**sizes).flops(T) == 6 * 4 * 64 * 128  # a key reads, too
    assert Mamba2(d_model=512, n_heads=16, head_dim=64, d_state=128).flops(T) == 4 * 16 * 64 * 128


def with_a_key_for_each_head(definition):
    """Chunks take q and k of fewer heads than v; the definitions do not."""

    def call(q, k, v, *rest):
        n_shared = v.shape[2] // q.shape[2]
        return definition(q.repeat_interleave(n_shared, 2), k.repeat_interleave(n_shared, 2), v, *rest)

    return call


def test_forward_flops_are_what_torch_counts(model, loops):
    """On one text, masks computed and thrown away, as both of torch's CPU paths do."""
    if any(type(module).__module__.startswith("llm.modules.sparse") for module in model.modules()):
        pytest.skip("short texts compute what the choice leaves out, too: the three tests below count the parts")
    for module in model.modules():
        if hasattr(getattr(module, "score_bias", None), "channels"):  # which would be more channels of q and k
            module.score_bias = module.score_bias.__call__
    tokens = torch.randint(97, (1, T))
    formula = forward_flops(dense(model), T) + padding_flops(model) - recurrent_flops(model)
    assert counted(model, lambda model: model(tokens)) == pytest.approx(T * formula, rel=1e-12)


SPARSE = {
    "native_sparse": {},
    "native_sparse, blocks apart": dict(compress_stride=8, n_kv_heads=4),
    "block_mixture": {},
    "deepseek_v3_2": {},
    "deepseek_v3_2, dense": dict(index_top_k=T, v_head_dim=40),
}


def tiny_sparse(case):
    return tiny_model(case.partition(",")[0], **SPARSE[case])


@pytest.mark.parametrize("case", SPARSE)
def test_each_linear_layer_of_a_sparse_model_costs_what_torch_counts_in_it(case):
    model = tiny_sparse(case)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(97, (1, T)))
    in_module = {name.partition(".")[2]: sum(found.values()) for name, found in counter.get_flop_counts().items()}
    layers = {name: m for name, m in model.blocks.named_modules(prefix="blocks") if isinstance(m, nn.Linear)}
    absorbed = {name for name in layers if name.endswith("kv_b_proj") and case == "deepseek_v3_2"}
    assert len(layers) > len(absorbed)
    for name in layers.keys() - absorbed:
        assert T * own_flops(layers[name], T) == pytest.approx(in_module[name], rel=1e-12), name


@torch.no_grad()
def test_the_absorbed_up_projection_costs_as_much_as_the_layer_that_it_replaces():
    """One half of its matrix for the queries, the other for what they read."""
    layer = tiny_model("deepseek_v3_2").blocks[0].mixer
    x, positions = torch.randn(1, T, 128).double(), torch.arange(T)
    parts = *layer.queries(x, positions), *layer.compress(x, positions)
    _, _, w_uv = layer.absorb(*parts)
    read = torch.randn(1, layer.n_heads, T, w_uv.shape[2]).double()
    absorbed = counted(layer, lambda layer: layer.absorb(*parts))
    assert absorbed + counted(None, lambda _: torch.einsum("bhtr,hdr->bthd", read, w_uv)) == T * own_flops(
        layer.kv_b_proj, T
    )


@pytest.mark.parametrize("case", SPARSE)
def test_sparse_attention_costs_two_products_for_each_key_that_a_query_sees(case, monkeypatch):
    """By loops over the queries; the layers also compute scores that they hide, as fused kernels under a mask do."""
    layer, pairs = tiny_sparse(case).blocks[0].mixer, []
    module = sys.modules[type(layer).__module__]
    attend_to_chosen = module.attend_to_chosen

    def count(q, k, v, index, shown, scale):
        pairs.append(shown.sum().item() * q.shape[1] // shown.shape[1])  # of a head's query and a chosen key
        return attend_to_chosen(q, k, v, index, shown, scale)

    monkeypatch.setattr(module, "attend_to_chosen", count)
    layer(torch.randn(1, T, 128).double(), torch.arange(T))
    earlier, n_heads = sum(t + 1 for t in range(T)), layer.n_heads
    if case.startswith("deepseek"):
        indexer, (rank, rope) = layer.indexer, layer.kv_split
        expected = 2 * indexer.n_heads * indexer.head_dim * earlier
        widths = 2 * rank + rope if pairs else sum(layer.q_split) + layer.expanded_split[1]
        assert bool(pairs) == ("dense" not in case)
        expected += 2 * widths * sum(pairs or [n_heads * earlier])
    elif case == "block_mixture":
        means = sum(t // layer.block_size for t in range(T))
        expected = 2 * layer.head_dim * n_heads * means + 4 * layer.head_dim * sum(pairs)
    else:
        ends = range(layer.size - 1, T, layer.stride)
        seen = sum(sum(end <= t for end in ends) + min(t + 1, layer.mask.size) for t in range(T))
        expected = 4 * layer.head_dim * (n_heads * seen + sum(pairs))
    assert T * layer.flops(T) == pytest.approx(expected, rel=1e-12)


def with_wide_values():
    return tiny_model("latent", v_head_dim=64)


def with_one_block_twice():
    model = tiny_model("baseline")
    model.blocks[1] = model.blocks[0]
    return model


def with_biased_experts():
    model = tiny_model("mixture_of_experts")
    model.blocks[0].ffn.experts.down_proj_bias = nn.Parameter(torch.zeros(model.config.n_experts, 128))
    return model


@pytest.mark.parametrize("make", [with_wide_values, with_one_block_twice, with_biased_experts])
def test_forward_flops_of_unusual_parts_are_what_torch_counts(make):
    model = make()
    total = counted(model, lambda model: model(torch.randint(97, (1, T))))
    assert total == pytest.approx(T * forward_flops(dense(model), T), rel=1e-12)


@pytest.mark.parametrize("name", ["baseline", "rope", "grouped_query", "latent", "mixture_of_experts"])
def test_training_takes_three_times_the_forward_flops(name):
    model = tiny_model(name)
    tokens = torch.randint(97, (2, T + 1))
    with sdpa_kernel(SDPBackend.MATH):  # the fused backward pass computes the scores again
        total = counted(model, lambda model: model.loss(tokens)[0].backward())
    assert total == pytest.approx(2 * T * 3 * forward_flops(dense(model), T), rel=1e-12)
    costs = describe(model, T)
    assert costs["training_flops_per_token"] == 3 * costs["flops_per_token"]


def attention(c, kv_share=1.0):
    """Queries and output, keys and values."""
    return 2 * c.d_model**2 + 2 * kv_share * c.d_model**2


def latent_attention(c):
    queries, keys_and_values = c.qk_nope_head_dim + c.qk_rope_head_dim, c.qk_nope_head_dim + c.v_head_dim
    down = c.d_model * (c.kv_lora_rank + c.qk_rope_head_dim) + c.kv_lora_rank  # the latent has a gain
    return down + c.n_heads * (c.d_model * queries + c.kv_lora_rank * keys_and_values + c.v_head_dim * c.d_model)


def mlp(c, width):
    return 2 * c.d_model * width


def experts(c, width, n_used):
    """A router and `n_used` of its experts."""
    return c.n_experts * c.d_model + n_used * mlp(c, width)


# what a layer has beside its two gains, and of this, where it is less, what a token goes through
LAYERS = {
    "baseline": lambda c: attention(c) + mlp(c, c.d_ff),
    "relative_position": lambda c: attention(c) + c.d_model**2 + 2 * c.d_model + mlp(c, c.d_ff),
    "t5_bias": lambda c: attention(c) + c.n_buckets * c.n_heads + mlp(c, c.d_ff),
    "qk_norm": lambda c: attention(c) + 2 * c.d_model / c.n_heads + mlp(c, c.d_ff),
    "multi_query": lambda c: attention(c, 1 / c.n_heads) + mlp(c, c.d_ff),
    "grouped_query": lambda c: attention(c, c.n_kv_heads / c.n_heads) + mlp(c, c.d_ff),
    "attention_sink": lambda c: attention(c) + c.n_heads + mlp(c, c.d_ff),
    "gated_attention": lambda c: attention(c) + c.d_model**2 + mlp(c, c.d_ff),
    "latent": lambda c: latent_attention(c) + mlp(c, c.d_ff),
    "swiglu": lambda c: attention(c) + 3 * c.d_model * 8 * round(c.d_ff / 12),
    "switch_transformer": lambda c: attention(c) + experts(c, c.d_ff, c.n_experts),
    "mixture_of_experts": lambda c: attention(c) + experts(c, c.d_expert, c.n_experts + c.n_shared_experts),
}
ACTIVE = {
    "switch_transformer": lambda c: attention(c) + experts(c, c.d_ff, 1),
    "mixture_of_experts": lambda c: attention(c) + experts(c, c.d_expert, c.top_k + c.n_shared_experts),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("small", [False, True])
def test_parameters_are_those_of_a_formula_in_the_sizes(name, small):
    Model = MODELS[name]
    c = Model.Config(**Model.Config.small) if small else Model.Config()
    with torch.device("meta"):
        costs = describe(Model(c))
    outside = c.vocab_size * c.d_model + c.d_model  # the embedding, which is the head, too, and the last gain
    for kind, layer in (("parameters", LAYERS[name]), ("active_parameters", ACTIVE.get(name, LAYERS[name]))):
        assert costs[kind] == outside + c.n_layers * (layer(c) + 2 * c.d_model)


@pytest.mark.parametrize("name", MODELS)
def test_active_parameters_are_those_that_one_token_reaches(name):
    """Through one token's gradient: rows of other tokens in an untied embedding aside, an idle expert gets none."""
    model = tiny_model(name).eval()
    model(torch.tensor([[5]])).square().sum().backward()
    idle = 0
    for path, parameter in model.named_parameters():
        chooses = path.startswith("blocks.") and ".indexer." in path  # a choice works, and has no gradient
        if parameter.grad is None and not chooses:
            idle += parameter.numel()
        elif ".experts." in path:
            idle += sum(part.numel() for part in parameter.grad if not part.any())
    costs = describe(model, T)
    assert costs["active_parameters"] == costs["parameters"] - idle


def test_the_baselines_costs_are_those_worked_out_by_hand():
    with torch.device("meta"):
        costs = describe(Baseline(Baseline.Config()))
    layer = 4 * 512 * 512 + 2 * 512 * 2048
    gains = (2 * 4 + 1) * 512
    assert costs["parameters"] == costs["active_parameters"] == 10_000 * 512 + 4 * layer + gains == 17_707_520
    assert costs["flops_per_token"] == 2 * (10_000 * 512 + 4 * layer) + 4 * 4 * 512 * 513 / 2
    assert costs["cache_bytes_per_token"] == 4 * 2 * 512 * 4  # layers, keys and values, width, bytes


def test_flops_and_cache_grow_with_the_context_unless_a_window_ends_it():
    short, long = (describe(tiny_model("baseline"), n) for n in (100, 400))
    assert long["flops_per_token"] - short["flops_per_token"] == 2 * 4 * 128 * 300 / 2  # 2 layers, 300 more keys / 2
    assert long["cache_bytes_per_token"] == short["cache_bytes_per_token"] == 2 * 2 * 128 * 8  # float64
    window = 16
    short, long = (describe(tiny_model("sliding_window", window_size=window), n) for n in (100, 400))
    assert long["cache_bytes_per_token"] * 400 == short["cache_bytes_per_token"] * 100 == window * 2 * 2 * 128 * 8
    assert long["flops_per_token"] - short["flops_per_token"] < 2 * 4 * 128 * window


def test_cached_bytes_count_few_key_heads_and_latents_as_they_are():
    baseline, multi_query, latent = (tiny_model(name) for name in ("baseline", "multi_query", "latent"))
    per_token = [describe(model, T)["cache_bytes_per_token"] for model in (baseline, multi_query, latent)]
    c = latent.config
    assert per_token[1] == per_token[0] / baseline.config.n_heads
    assert per_token[2] == c.n_layers * (c.kv_lora_rank + c.qk_rope_head_dim) * 8


def test_layers_that_share_a_cache_are_counted_once():
    model = tiny_model("baseline")
    alone = describe(model, T)["cache_bytes_per_token"]
    make_cache = model.make_cache

    def shared(*size):
        cache = make_cache(*size)
        return replace(cache, layers=cache.layers[:1] * len(cache.layers))

    model.make_cache = shared
    assert describe(model, T)["cache_bytes_per_token"] == alone / model.config.n_layers


@pytest.mark.parametrize(
    "mask, expected",
    [
        (masks.causal, (T + 1) / 2),
        (masks.everything, T),
        (masks.Window(1), 1),
        (masks.Window(8), 8 - 8 * 7 / 2 / T),
        (masks.OwnBlock(8), 4.5),
    ],
)
def test_mean_keys_are_counted_from_the_mask(mask, expected):
    assert mean_keys(mask, T) == pytest.approx(expected, rel=1e-12)


def test_mean_keys_of_a_long_text_are_estimated_without_its_whole_mask():
    assert mean_keys(masks.causal, 100_000) == pytest.approx(50_000.5, rel=1e-4)
    assert mean_keys(masks.Window(4096), 100_000) == pytest.approx(4096 - 4096 * 4095 / 2 / 100_000, rel=0.01)


def test_experts_beyond_the_chosen_cost_memory_but_no_work():
    few, many = (describe(tiny_model("mixture_of_experts", n_experts=n), T) for n in (4, 16))
    router = 2 * 12 * 128  # layers, more experts, width
    assert many["parameters"] > 1.5 * few["parameters"]
    assert many["active_parameters"] - few["active_parameters"] == router
    assert many["flops_per_token"] - few["flops_per_token"] == 2 * router


def test_a_module_may_say_what_it_computes():
    model = tiny_model("baseline")
    before = forward_flops(model, T)
    model.blocks[0].ffn.flops = lambda context: 1000 * context
    assert forward_flops(model, T) == before + 1000 * T


def test_a_module_may_say_which_of_its_parameters_a_token_leaves_out():
    model = tiny_model("baseline")
    model.blocks[0].ffn.idle_parameters = lambda: 100.0
    costs = describe(model, T)
    assert costs["active_parameters"] == costs["parameters"] - 100


def test_an_untied_head_costs_parameters_but_the_same_work():
    tied, untied = (describe(tiny_model("baseline", tie_embeddings=tie), T) for tie in (True, False))
    assert untied["parameters"] == tied["parameters"] + 97 * 128
    assert untied["flops_per_token"] == tied["flops_per_token"]


@pytest.mark.parametrize(
    "value, text",
    [
        (4.5, "4.50 "),
        (512, "512 "),
        (999.7, "1.00 k"),
        (17_707_520, "17.7 M"),
        (18_000_000, "18.0 M"),
        (3e12, "3.00 T"),
    ],
)
def test_numbers_for_people(value, text):
    assert units(value) == text


def test_the_summary_names_the_experts_a_token_uses_only_where_there_are_experts():
    lines = summary(tiny_model("baseline")).splitlines()
    assert [line[:12].strip() for line in lines] == ["parameters", "compute", "cache"]
    assert "active" not in lines[0]
    assert "active" in summary(tiny_model("mixture_of_experts")).splitlines()[0]


def test_the_memory_of_a_sharded_llama_is_what_the_page_on_training_says():
    with torch.device("meta"):
        model = Llama(SIZES[Llama]["llama3.1-8b"])
    found = sharded_memory(model, n_ranks=8, windows=1, context=8192)
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8").partition("## How to train Llama 3.1 8B")[2]
    rows = re.findall(r"^\|.*\| ([\d.]+) \|$", page.partition("\n## ")[0], re.MULTILINE)
    assert [f"{value / 1e9:.1f}" for value in found.values()] == rows
    assert sum(p.numel() for p in model.parameters()) == 8_030_261_248
    assert found["weights"] + found["gradients"] + found["optimiser"] == 16 * 8_030_261_248 / 8
    assert sharded_memory(model, n_ranks=16, windows=1, context=8192)["weights"] == found["weights"] / 2
