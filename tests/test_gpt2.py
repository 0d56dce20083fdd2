"""GPT-2 is transformers' GPT-2, in today's files and in those that OpenAI's models were published in."""

import json

import pytest
import torch
from parity import (
    assert_same_continuation,
    assert_same_logits,
    assert_survives_export,
    draw_tokens,
    original,
    twins,
)
from safetensors.torch import load_file, save_file

from llm.hub.maps import PUBLISHED, SIZES
from llm.hub.tables import PretrainedError, parts, plan, read_config
from llm.models.case_studies.gpt2 import GPT2
from llm.pretrained import load_pretrained

GPT2_ONLY = {"num_key_value_heads": None, "intermediate_size": None, "layer_norm_epsilon": 1e-3}
CASES = {
    "three heads": {"hidden_size": 24, "num_attention_heads": 3},
    "one head, a width of its own, untied": {"num_attention_heads": 1, "n_inner": 40, "tie_word_embeddings": False},
}


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_gpt2_equals_the_original(config, tmp_path):
    theirs, ours = twins(tmp_path, "GPT2LMHeadModel", **GPT2_ONLY, **config)
    assert_same_logits(theirs, ours)
    assert_same_continuation(theirs, ours, n_new=64 - 9)  # as far as there are positions
    assert_survives_export(theirs, ours, tmp_path)


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_gradients_equal_those_of_the_original(config, tmp_path):
    """Tensor by tensor as theirs are: alone, the bias of the keys has none, since it shifts all scores of a query."""
    theirs, ours = twins(tmp_path, "GPT2LMHeadModel", **GPT2_ONLY, **config)
    windows = draw_tokens(25)
    ours.loss(windows)[0].backward()
    theirs(windows, labels=windows).loss.backward()
    our_grads = {name: parameter.grad for name, parameter in ours.named_parameters()}
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    compared = set()
    for step in plan(PUBLISHED[GPT2].names, our_grads, expected):
        for name, grad in zip(step.theirs, step.operation.save(parts(our_grads, step)), strict=True):
            assert (grad - expected[name]).norm() <= 1e-4 * expected[name].norm(), name
            compared.add(name)
    assert compared == expected.keys()


def test_the_other_name_of_tanh_gelu_means_the_same(tmp_path):
    assert_same_logits(*twins(tmp_path, "GPT2LMHeadModel", **GPT2_ONLY, activation_function="gelu_pytorch_tanh"))


def test_files_as_published_are_read_without_a_prefix_and_with_stored_masks(tmp_path):
    theirs = original("GPT2LMHeadModel", **GPT2_ONLY)
    theirs.transformer.save_pretrained(tmp_path)  # names begin with h.0, not with transformer.h.0
    weights = load_file(tmp_path / "model.safetensors")
    assert "h.0.attn.c_attn.weight" in weights
    for layer in range(3):
        weights[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
        weights[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_same_logits(theirs, load_pretrained(tmp_path))


def test_a_tensor_that_is_no_mask_is_not_ignored(tmp_path):
    twins(tmp_path, "GPT2LMHeadModel", **GPT2_ONLY)
    weights = load_file(tmp_path / "theirs/model.safetensors")
    weights["transformer.h.0.attn.q_attn.bias"] = torch.zeros(32)
    save_file(weights, tmp_path / "theirs/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PretrainedError, match=r"1 left over: transformer.h.0.attn.q_attn.bias"):
        load_pretrained(tmp_path / "theirs")


@pytest.mark.parametrize(
    "field, value",
    [
        ("scale_attn_by_inverse_layer_idx", True),
        ("scale_attn_weights", False),
        ("activation_function", "relu"),
        ("add_cross_attention", True),
    ],
)
def test_a_setting_that_changes_the_result_is_an_error_that_names_it(tmp_path, field, value):
    original("GPT2LMHeadModel", **GPT2_ONLY).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, field: value}), encoding="utf-8")
    with pytest.raises(PretrainedError, match=field):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_published_sizes_have_the_published_number_of_parameters(name, parameters):
    with torch.device("meta"):
        model = GPT2(SIZES[GPT2][name])
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_the_config_of_the_published_xl_model_is_that_of_sizes():
    config = dict(
        **dict(activation_function="gelu_new", architectures=["GPT2LMHeadModel"], attn_pdrop=0.1, bos_token_id=50256),
        **dict(embd_pdrop=0.1, eos_token_id=50256, initializer_range=0.02, layer_norm_epsilon=1e-05, n_ctx=1024),
        **dict(model_type="gpt2", n_embd=1600, n_head=25, n_layer=48, n_positions=1024, output_past=True),
        **dict(resid_pdrop=0.1, summary_activation=None, summary_first_dropout=0.1, summary_proj_to_labels=True),
        **dict(summary_type="cls_index", summary_use_proj=True, vocab_size=50257),
        **dict(task_specific_params={"text-generation": {"do_sample": True, "max_length": 50}}),
    )
    assert GPT2.Config(**read_config(PUBLISHED[GPT2], config)) == SIZES[GPT2]["gpt2-xl"]


def test_the_table_of_positions_ends_at_the_context():
    model = GPT2(GPT2.Config(**{**GPT2.Config.small, "max_seq_len": 8}))
    with pytest.raises(ValueError, match="max_seq_len = 8"):
        model(torch.zeros(1, 9, dtype=torch.int64))
    with pytest.raises(ValueError, match="max_seq_len = 8"):
        model.make_cache(1, 9)
