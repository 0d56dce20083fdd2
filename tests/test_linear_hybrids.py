"""Hybrids of linear attention and attention against transformers: Qwen3-Next.

Logits past every chunk, greedy text through the cache, padded batches, gradients and export.
"""

import pytest
import torch
from parity import assert_parity, assert_same_logits_padded, twins

from llm.analysis.accounting import active_parameters
from llm.hub.maps import PUBLISHED, SIZES
from llm.hub.tables import read_config
from llm.models import MODELS

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
}


@pytest.mark.parametrize("architecture, config", CASES.values(), ids=CASES)
def test_logits_gradients_generation_and_export_are_those_of_transformers(tmp_path, architecture, config):
    assert_parity(tmp_path, architecture, n_tokens=100, atol=TOLERANCE, **config)


@pytest.mark.parametrize("architecture, config", CASES.values(), ids=CASES)
def test_texts_of_a_padded_batch_are_those_of_transformers(tmp_path, architecture, config):
    assert_same_logits_padded(*twins(tmp_path, architecture, **config), atol=TOLERANCE)


# Sizes


@pytest.mark.parametrize("name, size, parameters, active", [("qwen3_next", "qwen3-next-80b-a3b", 79_674_391_296, 3.9)])
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


@pytest.mark.parametrize("name, size, config", [("qwen3_next", "qwen3-next-80b-a3b", QWEN3_NEXT)])
def test_the_config_as_published_is_that_of_sizes(name, size, config):
    Model = MODELS[name]
    assert Model.Config(**read_config(PUBLISHED[Model], config)) == SIZES[Model][size]
