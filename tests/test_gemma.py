"""Gemma 2 and 3 are transformers' Gemma 2 and 3, past their windows and in every spelling of their settings."""

import pytest
import torch
from conftest import tiny_model
from parity import EAGER, assert_parity, assert_same_logits, draw_tokens, original, rewrite, twins

from llm.hub.maps import PUBLISHED, SIZES
from llm.hub.tables import PretrainedError, read_config
from llm.models.case_studies.gemma import Gemma2, Gemma3
from llm.pretrained import load_pretrained

LOCAL, GLOBAL = "sliding_attention", "full_attention"
HEADS = {"head_dim": 12, "query_pre_attn_scalar": 100, "sliding_window": 6}
GEMMA2 = {
    "grouped heads, low ceilings": {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0},
    "one key head, untied": {"num_key_value_heads": 1, "tie_word_embeddings": False},
    "three heads with keys of their own": {"hidden_size": 30, "num_attention_heads": 3, "num_key_value_heads": 3},
    "layers in an order of their own": {"layer_types": [GLOBAL, LOCAL, LOCAL]},
    "linear scaling": {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e3, "factor": 3.0}},
}
FAR = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
NEAR = {"rope_type": "default", "rope_theta": 100.0}
GEMMA3 = {
    "five local layers and a global one": {"num_hidden_layers": 6},
    "one key head, untied, every second layer": {
        "num_key_value_heads": 1,
        "tie_word_embeddings": False,
        "sliding_window_pattern": 2,
    },
    "linear scaling, in global layers only": {
        "layer_types": [LOCAL, GLOBAL, LOCAL],
        "rope_parameters": {GLOBAL: FAR, LOCAL: NEAR},
    },
    "three heads with keys of their own": {"hidden_size": 30, "num_attention_heads": 3, "num_key_value_heads": 3},
}


@pytest.mark.parametrize("config", GEMMA2.values(), ids=GEMMA2)
def test_gemma2_equals_the_original(config, tmp_path):
    assert_parity(tmp_path, "Gemma2ForCausalLM", **HEADS, **config)


@pytest.mark.parametrize("config", GEMMA3.values(), ids=GEMMA3)
def test_gemma3_equals_the_original(config, tmp_path):
    assert_parity(tmp_path, "Gemma3ForCausalLM", **HEADS, **config)


SCALINGS = {
    "dynamic": {"factor": 3.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": dict(factor=4.0, original_max_position_embeddings=16, low_freq_factor=1.0, high_freq_factor=4.0),
}


@pytest.mark.parametrize("rope_type", SCALINGS)
def test_positions_are_scaled_in_global_layers_only_beyond_the_trained_length_too(tmp_path, rope_type):
    far = {"rope_type": rope_type, "rope_theta": 5e3, **SCALINGS[rope_type]}
    settings = {"layer_types": [LOCAL, GLOBAL, LOCAL], "rope_parameters": {GLOBAL: far, LOCAL: NEAR}}
    wide = {**HEADS, "head_dim": 32, "max_position_embeddings": 16}
    theirs, ours = twins(tmp_path, "Gemma3ForCausalLM", **wide, **settings)
    assert ours.config.rope_scaling["rope_type"] == rope_type and ours.config.local_rope_theta == 100.0
    assert_same_logits(theirs, ours)


def test_the_spelling_of_the_first_gemma3_files_means_the_same(tmp_path):
    settings = {"layer_types": [LOCAL, GLOBAL, LOCAL], "rope_parameters": {GLOBAL: FAR, LOCAL: NEAR}}
    theirs = original("Gemma3ForCausalLM", **HEADS, **settings)
    theirs.save_pretrained(tmp_path)
    older = {"rope_theta": 1e6, "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_local_base_freq": 100.0}
    unknown_then = ("layer_types", "rope_parameters", "sliding_window_pattern", "_sliding_window_pattern")
    rewrite(tmp_path, without=unknown_then)
    rewrite(tmp_path, **older, sliding_window_pattern=2)
    assert_same_logits(theirs, load_pretrained(tmp_path))


def test_a_pattern_that_transformers_only_notes_down_counts_here_as_little(tmp_path):
    """Files of transformers 4.52 and later have it beside layer_types, under a name that is read no more."""
    original("Gemma3ForCausalLM", **HEADS).save_pretrained(tmp_path)
    rewrite(tmp_path, without=("layer_types", "sliding_window_pattern"), _sliding_window_pattern=2)
    theirs = pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(tmp_path, **EAGER).eval()
    assert theirs.config.layer_types == [LOCAL] * 3
    assert_same_logits(theirs, load_pretrained(tmp_path))


@pytest.mark.parametrize(
    "architecture, fields, message",
    [
        ("Gemma2ForCausalLM", {"attn_logit_softcapping": "50"}, "attn_logit_softcapping to .50.*a number"),
        ("Gemma2ForCausalLM", {"sliding_window": None}, "sliding_window to null"),
        ("Gemma2ForCausalLM", {"attention_bias": True}, "attention_bias"),
        ("Gemma2ForCausalLM", {"layer_types": [LOCAL, GLOBAL]}, "layer_types = .*: 3 layers need a list of 3"),
        ("Gemma2ForCausalLM", {"layer_types": GLOBAL}, "layer_types = full_attention: 3 layers need a list of 3"),
        ("Gemma2ForCausalLM", {"layer_types": [LOCAL, [GLOBAL], LOCAL]}, "layer_types"),
        ("Gemma2ForCausalLM", {"rope_parameters": {GLOBAL: FAR}}, "full_attention"),
        ("Gemma2ForCausalLM", {"layer_types": [LOCAL, "chunked_attention", GLOBAL]}, "chunked_attention"),
        ("Gemma3ForCausalLM", {"final_logit_softcapping": "30"}, "final_logit_softcapping"),
        ("Gemma3ForCausalLM", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("Gemma3ForCausalLM", {"rope_parameters": {LOCAL: FAR}}, "scales RoPE in layers with a window"),
        ("Gemma3ForCausalLM", {"rope_parameters": FAR}, "rope_parameters"),
        ("Gemma3ForCausalLM", {"rope_parameters": {GLOBAL: "linear"}}, "full_attention to .linear.*an object"),
        ("Gemma3ForCausalLM", {"sliding_window_pattern": 0}, "sliding_window_pattern to 0: it must be at least 1"),
        ("Gemma3ForCausalLM", {"rope_local_base_freq": "1e4"}, "rope_local_base_freq to .1e4.*a number"),
        ("Gemma3ForCausalLM", {"model_type": "gemma3"}, "gemma3_text.*gemma-3-270m.*gemma-3-1b"),
    ],
)
def test_a_setting_that_changes_the_result_is_an_error_that_names_it(architecture, fields, message, tmp_path):
    original(architecture, **HEADS).save_pretrained(tmp_path)
    rewrite(tmp_path, **fields)
    with pytest.raises(PretrainedError, match=message):
        load_pretrained(tmp_path)


def test_in_bf16_the_embeddings_are_scaled_by_a_rounded_factor_as_the_weights_were_trained(tmp_path):
    theirs, _ = twins(tmp_path, "Gemma3ForCausalLM", **HEADS, hidden_size=40)
    ours, tokens = load_pretrained(tmp_path / "theirs", dtype=torch.bfloat16), draw_tokens(40)
    assert torch.equal(ours.embed(tokens, None), theirs.bfloat16().model.embed_tokens(tokens))


def test_only_layers_with_a_window_have_a_short_cache():
    model = tiny_model("gemma3", n_layers=6, window_size=5)
    assert [layer["k"].shape[1] for layer in model.make_cache(1, 40).layers] == [5, 5, 5, 5, 5, 40]


def test_no_logit_of_gemma2_leaves_the_ceiling(tokens):
    model = tiny_model("gemma2", logit_soft_cap=3.0)
    model.norm.weight.data += 1000
    assert 2.9 < model(tokens).abs().max() <= 3


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("gemma2-2b", 2_614_341_888),
        ("gemma2-9b", 9_241_705_984),
        ("gemma2-27b", 27_227_128_320),
        ("gemma3-270m", 268_098_176),
        ("gemma3-1b", 999_885_952),
    ],
)
def test_published_sizes_have_the_published_number_of_parameters(name, parameters):
    Model = Gemma2 if name.startswith("gemma2") else Gemma3
    with torch.device("meta"):
        model = Model(SIZES[Model][name])
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_the_configs_of_published_models_are_those_of_sizes():
    common = dict(attention_bias=False, attention_dropout=0.0, bos_token_id=2, cache_implementation="hybrid")
    common |= dict(eos_token_id=1, hidden_activation="gelu_pytorch_tanh", initializer_range=0.02, pad_token_id=0)
    common |= dict(rms_norm_eps=1e-06, torch_dtype="bfloat16", use_cache=True, query_pre_attn_scalar=256, head_dim=256)
    nine = dict(attn_logit_softcapping=50.0, final_logit_softcapping=30.0, hidden_act="gelu_pytorch_tanh")
    nine |= dict(hidden_size=3584, intermediate_size=14336, max_position_embeddings=8192, model_type="gemma2")
    nine |= dict(num_attention_heads=16, num_hidden_layers=42, num_key_value_heads=8, rope_theta=10000.0)
    nine |= dict(sliding_window=4096, sliding_window_size=4096, vocab_size=256000)
    assert Gemma2.Config(**read_config(PUBLISHED[Gemma2], common | nine)) == SIZES[Gemma2]["gemma2-9b"]

    one = dict(attn_logit_softcapping=None, final_logit_softcapping=None, hidden_size=1152, intermediate_size=6912)
    one |= dict(max_position_embeddings=32768, model_type="gemma3_text", num_attention_heads=4, num_hidden_layers=26)
    one |= dict(num_key_value_heads=1, rope_local_base_freq=10000, rope_scaling=None, rope_theta=1000000)
    one |= dict(sliding_window=512, sliding_window_pattern=6, vocab_size=262144)
    assert Gemma3.Config(**read_config(PUBLISHED[Gemma3], common | one)) == SIZES[Gemma3]["gemma3-1b"]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"layer_types": ("local",)}, "--model.layer-types"),
        ({"layer_types": ()}, "--model.layer-types"),
        ({"window_size": 0}, "--model.window-size"),
        ({"query_width": 0}, "--model.query-width"),
        ({"local_rope_theta": 0.0}, "--model.local-rope-theta"),
    ],
)
def test_a_config_that_makes_no_sense_names_the_flag(fields, message):
    with pytest.raises(ValueError, match=message):
        Gemma3.Config(**fields)
