"""GPT-OSS is transformers' model, in full precision and in 4 bits, and its experts are their formula."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import redraw
from parity import (
    assert_same_continuation,
    assert_same_gradients,
    assert_same_logits,
    assert_survives_export,
    draw_tokens,
    original,
)
from safetensors.torch import load_file, save_file

from llm.analysis.accounting import active_parameters
from llm.hub.maps import PUBLISHED, SIZES
from llm.hub.tables import PretrainedError, read_config
from llm.models.case_studies.gpt_oss import GPTOSS
from llm.modules.ffn.clamped_experts import ClampedExperts
from llm.modules.ffn.moe import MoE
from llm.modules.ffn.router import SoftmaxRouter
from llm.pretrained import load_pretrained

SHAPE = dict(
    **dict(architecture="GptOssForCausalLM", hidden_size=24, num_attention_heads=3, num_key_value_heads=1),
    **dict(intermediate_size=20, num_local_experts=5, num_experts_per_tok=2, head_dim=32, sliding_window=6),
    rms_norm_eps=1e-3,
)
YARN = dict(rope_type="yarn", rope_theta=5e3, factor=4.0, original_max_position_embeddings=16, truncate=False)
CASES = {
    "yarn, not rounded": dict(rope_parameters=YARN),
    "as many key heads, tied, plain rotation": dict(
        **dict(num_key_value_heads=3, tie_word_embeddings=True, num_experts_per_tok=5, hidden_size=28),
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    ),
    "other order of layers, rounded yarn, narrow heads": dict(
        **dict(layer_types=["full_attention", "full_attention", "sliding_attention"], num_attention_heads=4),
        **dict(head_dim=16, num_key_value_heads=2, num_experts_per_tok=3, rope_parameters=YARN | {"truncate": True}),
    ),
}


@torch.no_grad()
def make_unruly(folder, **config) -> tuple:
    """(theirs, ours), with gates and inputs of the experts large enough that many are cut off."""
    theirs = original(**SHAPE | config)
    for layer in theirs.model.layers:
        layer.mlp.experts.gate_up_proj *= 8
        layer.mlp.experts.down_proj *= 0.05
    theirs.save_pretrained(folder / "theirs")
    return theirs, load_pretrained(folder / "theirs")


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_logits_gradients_generation_and_export_are_those_of_transformers(tmp_path, config):
    theirs, ours = make_unruly(tmp_path, **config)
    assert_same_logits(theirs, ours)
    assert_same_continuation(theirs, ours)
    assert_survives_export(theirs, ours, tmp_path)
    assert_same_gradients(theirs, ours, tmp_path)


@torch.no_grad()
def test_every_sink_bias_and_clamp_is_felt(tmp_path):
    """What the equality above is worth: each of them moves the logits by far more than it allows."""
    _, ours = make_unruly(tmp_path, **CASES["yarn, not rounded"])
    tokens = draw_tokens(40)
    before = ours(tokens)
    for name, parameter in ours.named_parameters():
        if name.endswith(("bias", "sinks")):
            kept = parameter.clone()
            parameter.zero_()
            assert (ours(tokens) - before).abs().max() > 1e-3, name
            parameter.copy_(kept)
    for block in ours.blocks:
        block.ffn.experts.limit = 1e9
        assert (ours(tokens) - before).abs().max() > 1e-3
        block.ffn.experts.limit = 7.0


def random_blocks(n_experts: int, n_out: int, n_in: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every byte and scales between 2^-9 and 2^-1, as 4-bit weights are stored."""
    blocks = torch.randint(256, (n_experts, n_out, n_in // 32, 16), dtype=torch.uint8)
    return blocks, torch.randint(118, 127, (n_experts, n_out, n_in // 32), dtype=torch.uint8)


@torch.no_grad()
def test_a_checkpoint_in_four_bits_is_what_transformers_makes_of_it(tmp_path):
    theirs = original(**SHAPE | {"hidden_size": 64, "intermediate_size": 96})
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    theirs.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for layer, block in enumerate(theirs.model.layers):
        for name, n_out, n_in in (("gate_up_proj", 2 * 96, 64), ("down_proj", 64, 96)):
            stored = f"model.layers.{layer}.mlp.experts.{name}"
            blocks, scales = random_blocks(5, n_out, n_in)
            expanded = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
            assert weights.pop(stored).shape == expanded.shape
            weights |= {f"{stored}_blocks": blocks, f"{stored}_scales": scales}
            getattr(block.mlp.experts, name).copy_(expanded)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    ours = load_pretrained(tmp_path)
    for block, layer in zip(ours.blocks, theirs.model.layers, strict=True):
        gate_up, down = layer.mlp.experts.gate_up_proj.mT, layer.mlp.experts.down_proj.mT
        assert torch.equal(block.ffn.experts.gate_up_proj, torch.cat([gate_up[:, ::2], gate_up[:, 1::2]], 1))
        assert torch.equal(block.ffn.experts.down_proj, down)
    assert_same_logits(theirs, ours)


def test_experts_are_their_formula_token_by_token():
    torch.manual_seed(0)
    moe = MoE(SoftmaxRouter(8, 6, 2, bias=True), ClampedExperts(8, 5, 6)).double()
    redraw(moe)
    e = moe.experts
    with torch.no_grad():
        e.gate_up_proj *= 12
    x = torch.randn(3, 7, 8, dtype=torch.float64)
    cut = []
    expected = torch.zeros_like(x)
    for place in torch.cartesian_prod(torch.arange(3), torch.arange(7)).tolist():
        token = x[tuple(place)]
        logits = moe.router.weight @ token + moe.router.bias
        best = logits.topk(2)
        for weight, i in zip(best.values.softmax(0), best.indices, strict=True):
            gate, up = (e.gate_up_proj[i] @ token + e.gate_up_proj_bias[i]).split(5)
            cut += [(gate > 7).any(), (gate < -7).any(), (up > 7).any(), (up < -7).any()]
            gate, up = gate.clamp(max=7), up.clamp(-7, 7)
            inner = gate / (1 + (-1.702 * gate).exp()) * (up + 1)
            expected[tuple(place)] += weight * (e.down_proj[i] @ inner + e.down_proj_bias[i])
    assert all(any(cut[kind::4]) for kind in range(4))
    torch.testing.assert_close(moe(x), expected, rtol=0, atol=1e-9)


def test_no_expert_reads_another_ones_bias_where_some_have_no_rows():
    experts = ClampedExperts(4, 3, 5)
    with torch.no_grad():
        experts.gate_up_proj.zero_(), experts.down_proj.zero_()
        experts.down_proj_bias.copy_(torch.arange(5.0)[:, None].expand(5, 4))
    ends = torch.tensor([0, 2, 2, 2, 3], dtype=torch.int32)  # two rows for expert 1, one for expert 4
    assert experts(torch.randn(3, 4), ends)[:, 0].tolist() == [1, 1, 4]


@pytest.mark.parametrize("name, parameters, active", [("20b", 20_914_757_184, 3.61), ("120b", 116_829_156_672, 5.13)])
def test_published_sizes_have_the_published_number_of_parameters(name, parameters, active):
    """The model card counts the head among the active ones, the embedding not."""
    with torch.device("meta"):
        model = GPTOSS(SIZES[GPTOSS][f"gpt-oss-{name}"])
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert active_parameters(model) - model.tok_embed.weight.numel() == pytest.approx(active * 1e9, abs=5e6)


def test_the_config_as_published_is_that_of_sizes():
    rope = dict(beta_fast=32.0, beta_slow=1.0, factor=32.0, original_max_position_embeddings=4096, truncate=False)
    config = dict(
        **dict(architectures=["GptOssForCausalLM"], attention_bias=True, attention_dropout=0.0, eos_token_id=200002),
        **dict(experts_per_token=4, head_dim=64, hidden_act="silu", hidden_size=2880, initial_context_length=4096),
        **dict(initializer_range=0.02, intermediate_size=2880, max_position_embeddings=131072, model_type="gpt_oss"),
        **dict(layer_types=["sliding_attention", "full_attention"] * 12, num_attention_heads=64, num_local_experts=32),
        **dict(num_experts_per_tok=4, num_hidden_layers=24, num_key_value_heads=8, output_router_logits=False),
        **dict(pad_token_id=199999, rms_norm_eps=1e-05, rope_scaling=rope | {"rope_type": "yarn"}, rope_theta=150000),
        **dict(router_aux_loss_coef=0.9, sliding_window=128, swiglu_limit=7.0, tie_word_embeddings=False),
        **dict(transformers_version="4.55.0.dev0", use_cache=True, vocab_size=201088),
        quantization_config=dict(modules_to_not_convert=["model.layers.*.self_attn"], quant_method="mxfp4"),
    )
    published = replace(SIZES[GPTOSS]["gpt-oss-20b"], layer_types=("sliding_attention", "full_attention") * 12)
    assert GPTOSS.Config(**read_config(PUBLISHED[GPTOSS], config)) == published
    del config["rope_scaling"], config["layer_types"]  # transformers takes the same where nothing is said
    assert GPTOSS.Config(**read_config(PUBLISHED[GPTOSS], config)) == SIZES[GPTOSS]["gpt-oss-20b"]


@pytest.mark.parametrize(
    "field, value",
    [
        ("swiglu_limit", 5.0),
        ("attention_bias", False),
        ("layer_types", ["chunked_attention"] * 3),
        ("layer_types", ["sliding_attention", "full_attention"]),
        ("sliding_window", None),  # transformers refuses it, too, in the first forward
        ("num_local_experts", None),
    ],
)
def test_a_setting_that_changes_the_result_is_an_error_that_names_it(tmp_path, field, value):
    original(**SHAPE).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, field: value}), encoding="utf-8")
    with pytest.raises(PretrainedError, match=field):
        load_pretrained(tmp_path)
