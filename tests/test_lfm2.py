"""LFM2 against transformers: convolutions and attention in several patterns, and what older files say otherwise."""

import pytest
import torch
from conftest import tiny_model
from parity import assert_parity, assert_same_logits, assert_same_logits_padded, original, rewrite, twins

from llm.analysis.accounting import cache_bytes
from llm.hub.maps import PUBLISHED, SIZES
from llm.hub.tables import PretrainedError, read_config
from llm.models.case_studies.lfm2 import LFM2
from llm.pretrained import load_pretrained

ATTENTION, CONV = "full_attention", "conv"
SMALL = {"block_multiple_of": 8, "layer_types": [CONV, CONV, ATTENTION]}
CASES = {
    "two convolutions, one attention": SMALL,
    "longer convolutions with biases": {**SMALL, "conv_L_cache": 4, "conv_bias": True, "num_hidden_layers": 3},
    "attention first, untied, the width as it stands": {
        **dict(layer_types=[ATTENTION, CONV, CONV], tie_word_embeddings=False, block_auto_adjust_ff_dim=False),
        "rope_parameters": {"rope_type": "default", "rope_theta": 300.0},
    },
    "a wider feed-forward layer, YaRN": {
        **dict(SMALL, block_ffn_dim_multiplier=1.3, head_dim=32),
        "rope_parameters": dict(
            rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=16, beta_fast=32.0
        ),
    },
    "convolutions alone": {**SMALL, "layer_types": [CONV] * 3},
    "attention alone": {**SMALL, "layer_types": None},
}


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_logits_gradients_generation_and_export_are_those_of_transformers(tmp_path, config):
    assert_parity(tmp_path, "Lfm2ForCausalLM", **config)


def test_in_a_padded_batch_logits_are_those_of_transformers(tmp_path):
    assert_same_logits_padded(*twins(tmp_path, "Lfm2ForCausalLM", **SMALL))


def test_the_first_files_number_the_attention_layers_and_spell_widths_otherwise(tmp_path):
    theirs = original("Lfm2ForCausalLM", **SMALL)
    theirs.save_pretrained(tmp_path)
    old = dict(full_attn_idxs=[2], block_ff_dim=48, tie_embedding=True, block_dim=32, conv_dim=32, conv_dim_out=32)
    old |= dict(block_norm_eps=1e-5, block_use_swiglu=True, num_heads=4, theta=1e6, use_pos_enc=True)
    rewrite(tmp_path, without=("layer_types", "intermediate_size", "tie_word_embeddings"), **old)
    assert_same_logits(theirs, load_pretrained(tmp_path))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"layer_types": [CONV, ATTENTION]}, "layer_types = .*: 3 layers need a list of 3"),
        ({"layer_types": [CONV, "sliding_attention", ATTENTION]}, "layer_types .* must be .*conv, full_attention"),
        ({"block_multiple_of": 0}, "block_multiple_of to 0"),
        ({"full_attn_idxs": 2}, "full_attn_idxs to 2: .* a list"),
        ({"hidden_act": "gelu"}, "hidden_act"),
    ],
)
def test_a_setting_that_changes_the_result_is_an_error_that_names_it(tmp_path, fields, message):
    original("Lfm2ForCausalLM", **SMALL).save_pretrained(tmp_path)
    rewrite(tmp_path, **fields)
    with pytest.raises(PretrainedError, match=message):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("lfm2-350m", 354_483_968),
        ("lfm2-700m", 742_489_344),
        ("lfm2-1.2b", 1_170_340_608),
        ("lfm2-2.6b", 2_569_272_320),
    ],
)
def test_published_sizes_have_the_published_number_of_parameters(name, parameters):
    with torch.device("meta"):
        model = LFM2(SIZES[LFM2][name])
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_the_config_of_the_published_model_is_that_of_sizes():
    config = dict(block_auto_adjust_ff_dim=True, block_dim=1024, block_ff_dim=6656, block_ffn_dim_multiplier=1.0)
    config |= dict(block_multiple_of=256, block_norm_eps=1e-05, block_use_swiglu=True, block_use_xavier_init=True)
    config |= dict(conv_L_cache=3, conv_bias=False, conv_dim=1024, conv_dim_out=1024, conv_use_xavier_init=True)
    config |= dict(full_attn_idxs=[2, 5, 8, 10, 12, 14], hidden_size=1024, max_position_embeddings=128000)
    config |= dict(model_type="lfm2", norm_eps=1e-05, num_attention_heads=16, num_heads=16, num_hidden_layers=16)
    config |= dict(num_key_value_heads=8, rope_theta=1000000.0, theta=1000000.0, use_pos_enc=True, vocab_size=65536)
    assert LFM2.Config(**read_config(PUBLISHED[LFM2], config)) == SIZES[LFM2]["lfm2-350m"]


def test_a_convolution_caches_two_vectors_whatever_the_length():
    model = tiny_model("lfm2", layer_types=("conv",))
    c = model.config
    assert cache_bytes(model, 10) == cache_bytes(model, 60) == c.n_layers * (c.conv_width - 1) * c.d_model * 8


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"layer_types": ()}, "--model.layer-types"),
        ({"layer_types": ("recurrent",)}, "--model.layer-types"),
        ({"conv_width": 0}, "--model.conv-width"),
    ],
)
def test_a_config_that_makes_no_sense_names_the_flag(fields, message):
    with pytest.raises(ValueError, match=message):
        LFM2.Config(**fields)
