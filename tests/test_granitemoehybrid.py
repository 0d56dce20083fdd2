"""Granite 4 against transformers: Mamba-2 and attention with and without RoPE, experts and none, multipliers."""

import pytest
import torch
from parity import (
    assert_parity,
    assert_same_logits,
    assert_same_logits_padded,
    original,
    rewrite,
    twins,
)
from safetensors.torch import load_file, save_file

from llm.analysis.accounting import active_parameters
from llm.hub.maps import PUBLISHED, SIZES
from llm.hub.tables import PretrainedError, read_config
from llm.models.case_studies.granitemoehybrid import GraniteMoEHybrid
from llm.pretrained import export_pretrained, load_pretrained

MAMBA, ATTENTION = "mamba", "attention"
SMALL = {
    **dict(num_local_experts=5, num_experts_per_tok=2, shared_intermediate_size=24),
    **dict(layer_types=[MAMBA, ATTENTION, MAMBA], mamba_n_heads=8, mamba_d_head=8, mamba_d_state=12),
    **dict(embedding_multiplier=3, attention_multiplier=0.2, residual_multiplier=0.6),
    **dict(logits_scaling=1.5, rms_norm_eps=1e-5),
}
CASES = {
    "experts, no positions": {**SMALL, "position_embedding_type": "nope"},
    "dense, two groups, tied": {
        **dict(SMALL, num_local_experts=0, num_experts_per_tok=0, mamba_n_groups=2, tie_word_embeddings=True),
    },
    "RoPE, biases in attention, none in the convolution": {
        **dict(SMALL, position_embedding_type="rope", attention_bias=True, mamba_conv_bias=False, mamba_d_conv=3),
        "rope_parameters": {"rope_type": "default", "rope_theta": 300.0},
    },
    "attention alone": {**SMALL, "layer_types": [ATTENTION] * 3, "position_embedding_type": "rope"},
    "Mamba-2 alone, three times as wide as the stream": {
        **dict(SMALL, layer_types=None, mamba_expand=3, mamba_n_heads=4, mamba_d_head="auto"),
    },
    "no multipliers": {
        **dict(SMALL, embedding_multiplier=1, attention_multiplier=1, residual_multiplier=1, logits_scaling=1),
    },
}


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_logits_gradients_generation_and_export_are_those_of_transformers(tmp_path, config):
    assert_parity(tmp_path, "GraniteMoeHybridForCausalLM", **config)


def test_logits_are_those_of_transformers_beyond_a_chunk_of_64(tmp_path):
    theirs, ours = twins(
        tmp_path, "GraniteMoeHybridForCausalLM", **SMALL, max_position_embeddings=200, mamba_chunk_size=16
    )
    assert_same_logits(theirs, ours, n_tokens=150)


def test_in_a_padded_batch_logits_are_those_of_transformers(tmp_path):
    assert_same_logits_padded(*twins(tmp_path, "GraniteMoeHybridForCausalLM", **SMALL))


def test_the_names_that_transformers_5_has_in_memory_are_read_too(tmp_path):
    theirs = original("GraniteMoeHybridForCausalLM", **SMALL)
    theirs.save_pretrained(tmp_path)
    names = {"input_linear": "experts.gate_up_proj", "output_linear": "experts.down_proj", "router.layer": "router"}
    weights = load_file(tmp_path / "model.safetensors")
    for old, new in names.items():
        tail = ".weight" if old == "router.layer" else ""
        for name in [name for name in weights if f"block_sparse_moe.{old}.weight" in name]:
            weights[name.replace(f"{old}.weight", new + tail)] = weights.pop(name)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_same_logits(theirs, load_pretrained(tmp_path))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"layer_types": [MAMBA, ATTENTION]}, "layer_types = .*: 3 layers need a list of 3"),
        ({"layer_types": [MAMBA, "sliding_attention", MAMBA]}, "layer_types .* must be .*mamba, attention"),
        ({"mamba_proj_bias": True}, "mamba_proj_bias"),
        ({"time_step_limit": [0.01, 0.1]}, "time_step_limit = 0.01"),
        ({"mamba_d_head": 9}, "8 mamba_n_heads of mamba_d_head = 9: .* = 64 wide"),
        ({"position_embedding_type": "alibi"}, "position_embedding_type = 'alibi'"),
        ({"num_experts_per_tok": 6}, "top_k = 6"),
    ],
)
def test_a_setting_that_changes_the_result_is_an_error_that_names_it(tmp_path, fields, message):
    original("GraniteMoeHybridForCausalLM", **SMALL).save_pretrained(tmp_path)
    rewrite(tmp_path, **fields)
    with pytest.raises(PretrainedError, match=message):
        load_pretrained(tmp_path)


def test_what_transformers_cannot_open_is_not_exported(tmp_path):
    model = GraniteMoEHybrid(GraniteMoEHybrid.Config(**GraniteMoEHybrid.Config.small | {"n_mamba_heads": 6}))
    with pytest.raises(PretrainedError, match=r"192 channels wide.* d_model = 128 .*--model.n-mamba-heads"):
        export_pretrained(model, tmp_path / "out")


@pytest.mark.parametrize(
    "name, parameters, active",
    [
        ("granite-4.0-h-350m", 340_332_224, 0.34e9),
        ("granite-4.0-h-micro", 3_191_396_096, 3.2e9),
        ("granite-4.0-h-tiny", 6_939_037_248, 1.5e9),  # 12.9 GiB in bf16, as the files on the hub; called 7B-A1B
        ("granite-4.0-h-small", 32_207_337_984, 9e9),  # 60.0 GiB; called 32B-A9B
        ("granite-4.0-micro", 3_402_836_480, 3.4e9),
    ],
)
def test_published_sizes_have_the_published_number_of_parameters(name, parameters, active):
    with torch.device("meta"):
        model = GraniteMoEHybrid(SIZES[GraniteMoEHybrid][name])
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert abs(active_parameters(model) / active - 1) < 0.05


def test_the_config_of_the_published_model_is_that_of_sizes():
    config = dict(attention_bias=False, attention_multiplier=0.015625, embedding_multiplier=12, hidden_act="silu")
    config |= dict(hidden_size=768, init_method="mup", intermediate_size=2048, logits_scaling=3)
    config |= dict(layer_types=[ATTENTION if i in (10, 13, 17, 27) else MAMBA for i in range(32)], rope_scaling=None)
    config |= dict(mamba_chunk_size=256, mamba_conv_bias=True, mamba_d_conv=4, mamba_d_head=32, mamba_d_state=128)
    config |= dict(mamba_expand=2, mamba_n_groups=1, mamba_n_heads=48, mamba_proj_bias=False, rms_norm_eps=1e-05)
    config |= dict(max_position_embeddings=32768, model_type="granitemoehybrid", normalization_function="rmsnorm")
    config |= dict(num_attention_heads=12, num_experts_per_tok=0, num_hidden_layers=32, num_key_value_heads=4)
    config |= dict(num_local_experts=0, position_embedding_type="nope", residual_multiplier=0.246, rope_theta=10000)
    config |= dict(router_aux_loss_coef=0.01, shared_intermediate_size=2048, tie_word_embeddings=True)
    found = GraniteMoEHybrid.Config(**read_config(PUBLISHED[GraniteMoEHybrid], config | {"vocab_size": 100352}))
    assert found == SIZES[GraniteMoEHybrid]["granite-4.0-h-350m"]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"layer_types": ()}, "--model.layer-types"),
        ({"layer_types": ("recurrent",)}, "--model.layer-types"),
        ({"n_mamba_heads": 0}, "--model.n-mamba-heads"),
        ({"n_experts": -1}, "--model.n-experts"),
        ({"n_experts": 2, "top_k": 3}, "--model.top-k"),
        ({"logits_scaling": 0.0}, "--model.logits-scaling"),
    ],
)
def test_a_config_that_makes_no_sense_names_the_flag(fields, message):
    with pytest.raises(ValueError, match=message):
        GraniteMoEHybrid.Config(**fields)
