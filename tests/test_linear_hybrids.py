"""Hybrids of linear attention and attention against transformers: Qwen3-Next, Qwen3.5, Kimi Linear, MiniMax-01.

Logits past every chunk, greedy text through the cache, padded batches, gradients and export.
"""

from dataclasses import replace
from pathlib import Path

import parity
import pytest
import torch
from conftest import redraw, tiny_model
from parity import assert_parity, assert_same_logits_padded, draw_tokens, logits, original, rewrite, twins

from llm.analysis.accounting import active_parameters
from llm.hub.load import find_published
from llm.hub.maps import SIZES
from llm.hub.tables import PretrainedError, read_config
from llm.models import MODELS
from llm.pretrained import export_pretrained, load_pretrained

LINEAR, FULL = "linear_attention", "full_attention"
ROPE = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
TOLERANCE = 1e-4  # chunks of the delta rule solve a system of equations in fp32, each in its own order
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
DELTA = dict(
    **dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=12, linear_value_head_dim=20),
    **dict(layer_types=[LINEAR, FULL, LINEAR], head_dim=16, rope_parameters=ROPE),
    rms_norm_eps=1e-3,  # a smaller one magnifies what rounding leaves of heads that answer almost nothing
)
EXPERTS = dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=12, shared_expert_intermediate_size=20)
NEXT = DELTA | EXPERTS
KIMI = dict(
    **dict(num_key_value_heads=4, kv_lora_rank=24, qk_nope_head_dim=10, qk_rope_head_dim=6, v_head_dim=14),
    **dict(moe_intermediate_size=16, num_local_experts=5, num_experts_per_tok=2, linear_head_dim=16),
    **dict(linear_num_heads=2, layer_types=[LINEAR, FULL, LINEAR], rms_norm_eps=1e-3),
)
MINIMAX = dict(
    **dict(num_local_experts=5, head_dim=12, layer_types=[LINEAR, FULL, LINEAR]),
    rope_parameters={"rope_type": "default", "rope_theta": 500.0},
)
CASES = {
    "qwen3_next": ("Qwen3NextForCausalLM", NEXT),
    "qwen3_next, biases, a dense layer, tied, weights that do not sum to 1": (
        "Qwen3NextForCausalLM",
        NEXT
        | dict(attention_bias=True, mlp_only_layers=[1], tie_word_embeddings=True, norm_topk_prob=False)
        | dict(linear_num_key_heads=4, linear_conv_kernel_dim=3),
    ),
    "qwen3_next, its own layers, yarn": (
        "Qwen3NextForCausalLM",
        NEXT
        | dict(num_hidden_layers=4, layer_types=None, head_dim=32, decoder_sparse_step=2)
        | dict(rope_parameters=YARN | {"partial_rotary_factor": 0.5}),
    ),
    "qwen3_5": ("Qwen3_5ForCausalLM", DELTA),
    "qwen3_5, biases, tied, a key head for each value head": (
        "Qwen3_5ForCausalLM",
        DELTA
        | dict(attention_bias=True, tie_word_embeddings=True, linear_num_key_heads=4)
        | dict(num_hidden_layers=4, layer_types=[FULL, LINEAR] * 2),
    ),
    "qwen3_5_moe": ("Qwen3_5MoeForCausalLM", NEXT),
    "qwen3_5_moe, biases, tied, its own layers, yarn": (
        "Qwen3_5MoeForCausalLM",
        NEXT
        | dict(attention_bias=True, tie_word_embeddings=True, linear_num_key_heads=4, linear_conv_kernel_dim=3)
        | dict(num_hidden_layers=4, layer_types=None, head_dim=32, num_experts_per_tok=3)
        | dict(rope_parameters=YARN | {"partial_rotary_factor": 0.25}),
    ),
    "kimi_linear": ("KimiLinearForCausalLM", KIMI),
    "kimi_linear, its own layers, a latent of queries, groups": (
        "KimiLinearForCausalLM",
        KIMI
        | dict(num_hidden_layers=5, layer_types=None, q_lora_rank=20, num_local_experts=8, n_group=4, topk_group=2)
        | dict(linear_conv_kernel_dim=3, norm_topk_prob=False, n_shared_experts=2, mlp_layer_types=["sparse"] * 5),
    ),
    "minimax": ("MiniMaxForCausalLM", MINIMAX),
    "minimax, its own layers, tied, weights of both residuals, a window": (
        "MiniMaxForCausalLM",
        MINIMAX
        | dict(layer_types=None, tie_word_embeddings=True, sliding_window=6, head_dim=None)
        | dict(full_attn_alpha_factor=0.7, full_attn_beta_factor=1.3, linear_attn_alpha_factor=1.6)
        | dict(linear_attn_beta_factor=0.8, mlp_alpha_factor=2, mlp_beta_factor=0.9),
    ),
}


def tolerance(architecture: str) -> float:
    return 2e-5 if architecture.startswith("MiniMax") else TOLERANCE  # which has no delta rule


@pytest.mark.parametrize("architecture, config", CASES.values(), ids=CASES)
def test_logits_gradients_generation_and_export_are_those_of_transformers(tmp_path, architecture, config):
    assert_parity(tmp_path, architecture, n_tokens=100, atol=tolerance(architecture), **config)


@pytest.mark.parametrize("architecture, config", CASES.values(), ids=CASES)
def test_texts_of_a_padded_batch_are_those_of_transformers(tmp_path, architecture, config):
    assert_same_logits_padded(*twins(tmp_path, architecture, **config), atol=tolerance(architecture))


@pytest.mark.parametrize("name, experts", [("Qwen3_5", {}), ("Qwen3_5Moe", EXPERTS)])
@torch.no_grad()
def test_of_a_qwen3_5_that_sees_images_the_text_model_is_read(tmp_path, name, experts):
    transformers = pytest.importorskip("transformers")
    rope = ROPE | {"mrope_section": [2, 1, 1], "mrope_interleaved": True}
    text = {**parity.SIZES, **DELTA, **experts, "rope_parameters": rope}
    vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32)
    config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=vision)
    theirs = getattr(transformers, f"{name}ForConditionalGeneration")(config).float().eval()
    redraw(theirs)
    theirs.save_pretrained(tmp_path)
    ours, tokens = load_pretrained(tmp_path), draw_tokens(40)
    assert type(ours) is MODELS[name.lower().replace("5moe", "5_moe")]
    expected = theirs(input_ids=tokens, use_cache=False).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(tokens), expected, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_a_minimax_turns_as_many_channels_as_rotary_dim_says(tmp_path, monkeypatch):
    """transformers 5.23 passes over it. Its rotation of a part of each head is in another of its models."""
    theirs = original("MiniMaxForCausalLM", **MINIMAX, rotary_dim=6)
    theirs.save_pretrained(tmp_path)
    ours, tokens = load_pretrained(tmp_path), draw_tokens(40)
    modeling = pytest.importorskip("transformers.models.minimax.modeling_minimax")
    partial = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next").apply_rotary_pos_emb
    assert (ours(tokens) - logits(theirs, tokens)).abs().max() > 0.1
    monkeypatch.setattr(modeling, "apply_rotary_pos_emb", partial)
    theirs.model.rotary_emb.inv_freq = 500.0 ** -(torch.arange(0, 6, 2) / 6)
    torch.testing.assert_close(ours(tokens), logits(theirs, tokens), rtol=0, atol=2e-5)
    with pytest.raises(PretrainedError, match=r"partial_rotary_factor = 0\.5.*--model.partial-rotary-factor 1"):
        export_pretrained(ours, tmp_path / "out")


def test_a_kimi_linear_with_a_tied_head_is_not_exported(tmp_path):
    with pytest.raises(PretrainedError, match="tie_embeddings = True"):
        export_pretrained(tiny_model("kimi_linear", tie_embeddings=True).float(), tmp_path / "out")


@pytest.mark.parametrize(
    "architecture, settings, fields, says",
    [
        ("KimiLinearForCausalLM", KIMI, {"mlp_layer_types": ["sparse", "dense", "sparse"]}, "dense layers first"),
        ("KimiLinearForCausalLM", KIMI, {"mla_use_nope": False}, "mla_use_nope = False"),
        ("KimiLinearForCausalLM", KIMI, {"linear_attn_config": {"gate_lower_bound": -5.0}}, "gate_lower_bound"),
        (
            "KimiLinearForCausalLM",
            KIMI,
            {"linear_attn_config": {"num_heads": 0}},
            "num_heads in linear_attn_config to 0",
        ),
        ("MiniMaxForCausalLM", MINIMAX, {"postnorm": False}, "postnorm = False"),
        ("MiniMaxForCausalLM", MINIMAX, {"rotary_dim": 0}, "rotary_dim to 0"),
        ("MiniMaxForCausalLM", MINIMAX, {"layer_types": [FULL]}, "3 layers need a list of 3"),
        ("Qwen3_5ForCausalLM", DELTA, {"attn_output_gate": False}, "attn_output_gate = False"),
        ("Qwen3NextForCausalLM", NEXT, {"linear_num_key_heads": 3}, "n_linear_k_heads = 3 does not divide"),
        ("Qwen3NextForCausalLM", NEXT, {"layer_types": None, "full_attention_interval": 0}, "full_attention_interval"),
    ],
)
def test_a_setting_that_changes_the_result_is_an_error_that_names_it(tmp_path, architecture, settings, fields, says):
    original(architecture, **settings).save_pretrained(tmp_path)
    rewrite(tmp_path, **fields)
    with pytest.raises(PretrainedError, match=says):
        load_pretrained(tmp_path)


# Sizes


@pytest.mark.parametrize(
    "name, size, parameters, active",
    [
        ("qwen3_next", "qwen3-next-80b-a3b", 79_674_391_296, 3.9),
        ("qwen3_5", "qwen3.5-9b", 8_953_803_264, 8.95),
        ("qwen3_5", "qwen3.5-27b", 26_895_998_464, 26.9),
        ("qwen3_5_moe", "qwen3.5-35b-a3b", 34_660_610_688, 3.45),
        ("qwen3_5_moe", "qwen3.5-122b-a10b", 122_111_526_912, 9.8),
        ("qwen3_5_moe", "qwen3.5-397b-a17b", 396_346_350_336, 17.3),
        ("kimi_linear", "kimi-linear-48b-a3b", 49_122_675_072, 3.5),
        ("minimax", "minimax-text-01", 456_089_655_296, 48.4),
    ],
)
def test_published_sizes_have_their_number_of_parameters(name, size, parameters, active):
    Model = MODELS[name]
    with torch.device("meta"):
        model = Model(SIZES[Model][size])
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert active_parameters(model) / 1e9 == pytest.approx(active, rel=0.02)


QWEN3_NEXT = dict(
    **dict(architectures=["Qwen3NextForCausalLM"], attention_dropout=0.0, bos_token_id=151643, eos_token_id=151645),
    **dict(decoder_sparse_step=1, full_attention_interval=4, head_dim=256, hidden_act="silu", hidden_size=2048),
    **dict(initializer_range=0.02, intermediate_size=5120, linear_conv_kernel_dim=4, linear_key_head_dim=128),
    **dict(linear_num_key_heads=16, linear_num_value_heads=32, linear_value_head_dim=128, mlp_only_layers=[]),
    **dict(max_position_embeddings=262144, model_type="qwen3_next", moe_intermediate_size=512, norm_topk_prob=True),
    **dict(num_attention_heads=16, num_experts=512, num_experts_per_tok=10, num_hidden_layers=48),
    **dict(num_key_value_heads=2, output_router_logits=False, partial_rotary_factor=0.25, rms_norm_eps=1e-06),
    **dict(rope_scaling=None, rope_theta=10000000, router_aux_loss_coef=0.001, shared_expert_intermediate_size=512),
    **dict(tie_word_embeddings=False, torch_dtype="bfloat16", use_cache=True, use_sliding_window=False),
    **dict(vocab_size=151936),
)


KIMI_48B = dict(
    **dict(architectures=["KimiLinearForCausalLM"], bos_token_id=163584, dtype="bfloat16", eos_token_id=163586),
    **dict(auto_map={"AutoConfig": "configuration_kimi.KimiLinearConfig"}, first_k_dense_replace=1, head_dim=72),
    **dict(hidden_act="silu", hidden_size=2304, initializer_range=0.02, intermediate_size=9216, kv_lora_rank=512),
    **dict(mla_use_nope=True, model_max_length=1048576, model_type="kimi_linear", moe_intermediate_size=1024),
    **dict(moe_layer_freq=1, moe_renormalize=True, moe_router_activation_func="sigmoid", num_attention_heads=32),
    **dict(num_expert_group=1, num_experts=256, num_experts_per_token=8, num_hidden_layers=27),
    **dict(num_key_value_heads=32, num_nextn_predict_layers=0, num_shared_experts=1, pad_token_id=163839),
    **dict(q_lora_rank=None, qk_nope_head_dim=128, qk_rope_head_dim=64, rms_norm_eps=1e-05, rope_scaling=None),
    **dict(rope_theta=10000.0, routed_scaling_factor=2.446, tie_word_embeddings=False, topk_group=1),
    **dict(use_cache=True, use_grouped_topk=True, v_head_dim=128, vocab_size=163840),
    linear_attn_config=dict(
        full_attn_layers=[4, 8, 12, 16, 20, 24, 27],
        kda_layers=[layer for layer in range(1, 27) if layer % 4],
        **dict(head_dim=128, num_heads=32, short_conv_kernel_size=4),
    ),
)
MINIMAX_456B = dict(
    **dict(architectures=["MiniMaxForCausalLM"], model_type="minimax", attention_dropout=0.0, head_dim=128),
    **dict(layer_types=([LINEAR] * 7 + [FULL]) * 10, hidden_size=6144, intermediate_size=9216, hidden_act="silu"),
    **dict(full_attn_alpha_factor=3.5565588200778455, full_attn_beta_factor=1.0, mlp_beta_factor=1.0),
    **dict(linear_attn_alpha_factor=3.5565588200778455, linear_attn_beta_factor=1.0),
    **dict(mlp_alpha_factor=3.5565588200778455, max_position_embeddings=10240000, num_attention_heads=64),
    **dict(num_experts_per_tok=2, num_hidden_layers=80, num_key_value_heads=8, num_local_experts=32, postnorm=True),
    **dict(rms_norm_eps=1e-05, rope_theta=10000000, rotary_dim=64, shared_intermediate_size=0),
    **dict(shared_moe_mode="sigmoid", sliding_window=None, tie_word_embeddings=False, vocab_size=200064),
)
QWEN35_27B = dict(
    **dict(architectures=["Qwen3_5ForConditionalGeneration"], image_token_id=248056, model_type="qwen3_5"),
    text_config=dict(
        **dict(attention_bias=False, attention_dropout=0.0, attn_output_gate=True, eos_token_id=248044, head_dim=256),
        **dict(full_attention_interval=4, hidden_act="silu", hidden_size=5120, initializer_range=0.02),
        **dict(intermediate_size=17408, linear_conv_kernel_dim=4, linear_key_head_dim=128, linear_num_key_heads=16),
        **dict(linear_num_value_heads=48, linear_value_head_dim=128, mamba_ssm_dtype="float32", mlp_only_layers=[]),
        **dict(max_position_embeddings=262144, model_type="qwen3_5_text", mtp_num_hidden_layers=1),
        **dict(mtp_use_dedicated_embeddings=False, num_attention_heads=24, num_hidden_layers=64),
        **dict(num_key_value_heads=4, rms_norm_eps=1e-06, use_cache=True, vocab_size=248320),
        rope_parameters=dict(
            **dict(mrope_interleaved=True, mrope_section=[11, 11, 10], rope_type="default", rope_theta=10000000),
            partial_rotary_factor=0.25,
        ),
    ),
    tie_word_embeddings=False,
    vision_config={"depth": 27, "model_type": "qwen3_5"},
)


@pytest.mark.parametrize(
    "name, size, config",
    [
        ("qwen3_next", "qwen3-next-80b-a3b", QWEN3_NEXT),
        ("qwen3_5", "qwen3.5-27b", QWEN35_27B),
        ("kimi_linear", "kimi-linear-48b-a3b", KIMI_48B),
        ("minimax", "minimax-text-01", MINIMAX_456B),
    ],
)
def test_the_config_as_published_is_that_of_sizes(name, size, config):
    Model, published = find_published(Path(size), config)
    found, size = Model.Config(**read_config(published, config)), SIZES[Model][size]
    types = tuple(map(size.layer_type, range(size.n_layers)))
    assert Model is MODELS[name] and replace(found, layer_types=types) == replace(size, layer_types=types)
    assert tuple(map(found.layer_type, range(size.n_layers))) == types


def test_a_qwen3_5_that_transformers_does_not_have_is_not_exported(tmp_path):
    for settings, says in ((dict(dense_layers=(0,)), "dense_layers = .0,"), (dict(normalize_weights=False), "False")):
        with pytest.raises(PretrainedError, match=says):
            export_pretrained(tiny_model("qwen3_5_moe", **settings).float(), tmp_path / "out")
