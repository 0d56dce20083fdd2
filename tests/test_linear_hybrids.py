"""Hybrids of linear attention and attention against transformers: Qwen3-Next, Qwen3.5.

Logits past every chunk, greedy text through the cache, padded batches, gradients and export.
"""

from pathlib import Path

import parity
import pytest
import torch
from conftest import redraw, tiny_model
from parity import assert_parity, assert_same_logits_padded, draw_tokens, twins

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
}


@pytest.mark.parametrize("architecture, config", CASES.values(), ids=CASES)
def test_logits_gradients_generation_and_export_are_those_of_transformers(tmp_path, architecture, config):
    assert_parity(tmp_path, architecture, n_tokens=100, atol=TOLERANCE, **config)


@pytest.mark.parametrize("architecture, config", CASES.values(), ids=CASES)
def test_texts_of_a_padded_batch_are_those_of_transformers(tmp_path, architecture, config):
    assert_same_logits_padded(*twins(tmp_path, architecture, **config), atol=TOLERANCE)


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
    [("qwen3_next", "qwen3-next-80b-a3b", QWEN3_NEXT), ("qwen3_5", "qwen3.5-27b", QWEN35_27B)],
)
def test_the_config_as_published_is_that_of_sizes(name, size, config):
    Model, published = find_published(Path(size), config)
    assert Model is MODELS[name] and Model.Config(**read_config(published, config)) == SIZES[Model][size]


def test_a_qwen3_5_that_transformers_does_not_have_is_not_exported(tmp_path):
    for settings, says in ((dict(dense_layers=(0,)), "dense_layers = .0,"), (dict(normalize_weights=False), "False")):
        with pytest.raises(PretrainedError, match=says):
            export_pretrained(tiny_model("qwen3_5_moe", **settings).float(), tmp_path / "out")
