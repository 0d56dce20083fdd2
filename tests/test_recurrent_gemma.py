"""RecurrentGemma against transformers: recurrences and windows in several patterns."""

import pytest
import torch
from parity import assert_parity, assert_same_logits, draw_tokens, logits, original, rewrite, twins

from llm.hub.maps import PUBLISHED, SIZES
from llm.hub.tables import PretrainedError, read_config
from llm.models.case_studies.recurrent_gemma import RecurrentGemma
from llm.pretrained import load_pretrained

RECURRENT, ATTENTION = "recurrent", "attention"
SMALL = {"num_key_value_heads": 1, "attention_window_size": 6, "logits_soft_cap": 5.0}
CASES = {
    "two recurrences, one attention": SMALL,
    "a narrower recurrence, biases, untied": {
        **dict(SMALL, lru_width=40, conv1d_width=3, attention_bias=True, tie_word_embeddings=False),
        **dict(num_key_value_heads=2, hidden_size=48),
    },
    "attention first, whole heads turn": {
        **dict(SMALL, block_types=[ATTENTION, RECURRENT], num_hidden_layers=4),
        "rope_parameters": {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 1.0},
    },
    "recurrences alone": {**SMALL, "block_types": [RECURRENT]},
    "attention alone": {**SMALL, "block_types": [ATTENTION]},
}


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_logits_gradients_generation_and_export_are_those_of_transformers(tmp_path, config):
    assert_parity(tmp_path, "RecurrentGemmaForCausalLM", **config)


@torch.no_grad()
def test_a_padded_batch_gives_what_transformers_gives_each_text_alone(tmp_path):
    """Not what it gives a padded batch, where its recurrence and its convolution read the padding, too."""
    theirs, ours = twins(tmp_path, "RecurrentGemmaForCausalLM", **SMALL)
    tokens, padding = draw_tokens(24, rows=3), torch.tensor([0, 5, 11])
    cache = ours.make_cache(3, 24, padding)
    found = torch.cat([ours(part, cache) for part in tokens.split([13, 1, 1, 9], 1)], 1)
    for row, n in enumerate(padding):
        torch.testing.assert_close(found[row, n:], logits(theirs, tokens[row : row + 1, n:])[0], rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"head_dim": 9}, "head_dim = 9"),
        ({"block_types": [RECURRENT, "mamba"]}, "layer_types .* must be .*recurrent, attention"),
        ({"embeddings_scale_by_sqrt_dim": False}, "embeddings_scale_by_sqrt_dim"),
        ({"hidden_activation": "silu"}, "hidden_activation"),
    ],
)
def test_a_setting_that_changes_the_result_is_an_error_that_names_it(tmp_path, fields, message):
    original("RecurrentGemmaForCausalLM", **SMALL).save_pretrained(tmp_path)
    rewrite(tmp_path, **fields)
    with pytest.raises(PretrainedError, match=message):
        load_pretrained(tmp_path)


def test_the_first_files_say_less(tmp_path):
    theirs = original("RecurrentGemmaForCausalLM", **SMALL)
    theirs.save_pretrained(tmp_path)
    old = dict(_block_types=[RECURRENT, RECURRENT, ATTENTION], embeddings_scale_by_sqrt_dim=True, head_dim=8)
    rewrite(tmp_path, ("block_types", "rope_parameters"), **old, partial_rotary_factor=0.5, rope_theta=10000.0)
    assert_same_logits(theirs, load_pretrained(tmp_path))


@pytest.mark.parametrize(
    "name, parameters", [("recurrentgemma-2b", 2_682_862_080), ("recurrentgemma-9b", 8_579_977_216)]
)
def test_published_sizes_have_the_published_number_of_parameters(name, parameters):
    with torch.device("meta"):
        model = RecurrentGemma(SIZES[RecurrentGemma][name])
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_the_config_of_the_published_model_is_that_of_sizes():
    config = dict(_block_types=[RECURRENT, RECURRENT, ATTENTION], attention_bias=False, attention_window_size=2048)
    config |= dict(conv1d_width=4, embeddings_scale_by_sqrt_dim=True, head_dim=256, hidden_size=2560, lru_width=2560)
    config |= dict(hidden_activation="gelu_pytorch_tanh", intermediate_size=15360, logits_soft_cap=30.0)
    config |= dict(model_type="recurrent_gemma", num_attention_heads=10, num_hidden_layers=26, num_key_value_heads=1)
    config |= dict(partial_rotary_factor=0.5, rms_norm_eps=1e-06, rope_theta=10000.0, vocab_size=256000)
    found = RecurrentGemma.Config(**read_config(PUBLISHED[RecurrentGemma], config))
    assert found == SIZES[RecurrentGemma]["recurrentgemma-2b"]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"layer_types": ()}, "--model.layer-types"),
        ({"d_rnn": 100}, "--model.d-rnn"),
        ({"partial_rotary_factor": 0.0}, "--model.partial-rotary-factor"),
    ],
)
def test_a_config_that_makes_no_sense_names_the_flag(fields, message):
    with pytest.raises(ValueError, match=message):
        RecurrentGemma.Config(**fields)
