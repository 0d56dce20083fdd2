"""Mamba, Mamba-2 and the hybrids built on them against transformers: logits, padding, text, gradients, export."""

import pytest
import torch
from parity import assert_parity, assert_same_logits, draw_tokens, original, twins
from test_families import rewrite

from llm.analysis.accounting import cache_bytes
from llm.hub.maps import BY_TYPE, SIZES
from llm.hub.tables import PretrainedError, read_config
from llm.models import MODELS
from llm.pretrained import load_pretrained

NO_ATTENTION = {"num_attention_heads": None, "num_key_value_heads": None}
MAMBA = {**NO_ATTENTION, "intermediate_size": 64, "state_size": 8}
MAMBA2 = {**MAMBA, "num_heads": 4, "head_dim": 16, "n_groups": 2}
JAMBA = {
    **dict(num_hidden_layers=4, attn_layer_period=4, attn_layer_offset=2, num_experts=4, num_experts_per_tok=2),
    **dict(mamba_d_state=8, mamba_dt_rank=5),
}
NEMOTRON = {
    **dict(num_hidden_layers=None, hybrid_override_pattern="M-*E", head_dim=12, ssm_state_size=8, mamba_num_heads=4),
    **dict(mamba_head_dim=16, n_groups=2, n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=16),
    **dict(moe_shared_expert_intermediate_size=20),
}
FALCON = {
    **dict(head_dim=12, mamba_d_ssm=48, mamba_n_heads=4, mamba_d_head=12, mamba_n_groups=2, mamba_d_state=8),
    **dict(embedding_multiplier=2.0, lm_head_multiplier=0.5, attention_in_multiplier=1.3, key_multiplier=0.7),
    **dict(attention_out_multiplier=0.8, ssm_in_multiplier=1.25, ssm_out_multiplier=0.6, mlp_multipliers=[1.5, 0.9]),
    **dict(ssm_multipliers=[0.9, 1.1, 0.8, 1.2, 1.4], mamba_norm_before_gate=False),
}
CASES = {
    "mamba": ("MambaForCausalLM", MAMBA),
    "mamba, wide, a rank of its own, untied": (
        "MambaForCausalLM",
        {**MAMBA, "expand": 3, "intermediate_size": 96, "time_step_rank": 5, "conv_kernel": 3}
        | {"tie_word_embeddings": False, "layer_norm_epsilon": 0.1},
    ),
    "mamba2": ("Mamba2ForCausalLM", MAMBA2),
    "mamba2, one group, narrow heads, tied": (
        "Mamba2ForCausalLM",
        {**MAMBA2, "n_groups": 1, "num_heads": 8, "head_dim": 8, "conv_kernel": 3}
        | {"tie_word_embeddings": True, "layer_norm_epsilon": 0.1},
    ),
    "jamba": ("JambaForCausalLM", JAMBA),
    "jamba, experts first, tied": (
        "JambaForCausalLM",
        {**JAMBA, **dict(attn_layer_period=2, attn_layer_offset=0, expert_layer_period=3, expert_layer_offset=0)}
        | dict(tie_word_embeddings=True, mamba_expand=3, mamba_dt_rank="auto", rms_norm_eps=0.1),
    ),
    "jamba, one expert": ("JambaForCausalLM", {**JAMBA, "num_experts": 1, "num_experts_per_tok": 1}),
    "nemotron_h": ("NemotronHForCausalLM", NEMOTRON),
    "nemotron_h, long steps, groups of experts": (
        "NemotronHForCausalLM",
        {**NEMOTRON, **dict(hybrid_override_pattern="EM*M", time_step_min=0.7, n_group=4, topk_group=2)}
        | dict(routed_scaling_factor=2.5, norm_topk_prob=False, layer_norm_epsilon=0.1),
    ),
    "nemotron_h, a latent": (
        "NemotronHForCausalLM",
        {**NEMOTRON, "hybrid_override_pattern": "ME*", "moe_latent_size": 24},
    ),
    "falcon_h1": ("FalconH1ForCausalLM", FALCON),
    "falcon_h1, a norm after the gate, tied": (
        "FalconH1ForCausalLM",
        {**FALCON, **dict(mamba_rms_norm=True, rms_norm_eps=0.1, tie_word_embeddings=True)},
    ),
    "falcon_h1, without multipliers": (
        "FalconH1ForCausalLM",
        dict(
            mamba_d_ssm=None,
            mamba_n_heads=4,
            mamba_d_state=8,
            rope_parameters=dict(rope_type="default", rope_theta=1e11),
        ),
    ),
}
FIRST = {architecture: config for architecture, config in reversed(CASES.values())}
"""One configuration of each architecture, the first in CASES."""


@pytest.mark.parametrize("architecture, config", CASES.values(), ids=CASES)
def test_logits_gradients_generation_and_export_are_those_of_transformers(tmp_path, architecture, config):
    assert_parity(tmp_path, architecture, **config)


@pytest.mark.parametrize("architecture, config", FIRST.items(), ids=FIRST)
@torch.no_grad()
def test_padding_on_the_left_changes_nothing_in_either(tmp_path, architecture, config):
    theirs, ours = twins(tmp_path, architecture, **config)
    tokens, padding = draw_tokens(40, rows=3), torch.tensor([0, 7, 22])
    mask = (torch.arange(40) >= padding[:, None]).long()
    expected = theirs(tokens, attention_mask=mask, use_cache=False).logits
    cache = ours.make_cache(3, 40, padding)
    found = torch.cat([ours(part, cache) for part in tokens.split([25, 1, 14], 1)], 1)
    for row, n in enumerate(padding):
        torch.testing.assert_close(found[row, n:], expected[row, n:], rtol=0, atol=2e-5)


@pytest.mark.parametrize("architecture, config", FIRST.items(), ids=FIRST)
def test_texts_longer_than_a_chunk(tmp_path, architecture, config):
    """A chunk has 64 tokens here and 32 there."""
    theirs = original(architecture, **config, max_position_embeddings=256)
    theirs.save_pretrained(tmp_path)
    for module in theirs.modules():
        if hasattr(module, "chunk_size"):
            module.chunk_size = 32
    assert_same_logits(theirs, load_pretrained(tmp_path), n_tokens=150)


# Settings


INFINITY = float("inf")


@pytest.mark.parametrize("limit", [[0.0, INFINITY], [0, {"__float__": "Infinity"}], [0.0, "Infinity"], None])
def test_steps_of_any_size_are_spelled_in_several_ways(tmp_path, limit):
    theirs, _ = twins(tmp_path, "Mamba2ForCausalLM", **MAMBA2)
    rewrite(tmp_path / "theirs", time_step_limit=limit)
    assert_same_logits(theirs, load_pretrained(tmp_path / "theirs"))


@pytest.mark.parametrize(
    "architecture, fields, says",
    [
        ("MambaForCausalLM", {"use_bias": True}, "use_bias = True"),
        ("MambaForCausalLM", {"intermediate_size": 65}, "intermediate_size = 65: this model knows 64 only"),
        ("MambaForCausalLM", {"time_step_rank": 0}, "time_step_rank"),
        ("Mamba2ForCausalLM", {"time_step_limit": [0.001, INFINITY]}, "time_step_limit .*steps of any size"),
        ("Mamba2ForCausalLM", {"time_step_limit": [0.0, 1.0]}, "time_step_limit .*steps of any size"),
        ("Mamba2ForCausalLM", {"num_heads": 5}, "num_heads = 5 and head_dim = 16.*hidden_size, 64"),
        ("Mamba2ForCausalLM", {"n_groups": 3}, "n_groups = 3 does not divide n_heads = 4"),
    ],
)
def test_a_setting_that_changes_the_result_is_an_error_that_names_it(tmp_path, architecture, fields, says):
    original(architecture, **FIRST[architecture]).save_pretrained(tmp_path)
    rewrite(tmp_path, **fields)
    with pytest.raises(PretrainedError, match=says):
        load_pretrained(tmp_path)


# config.json as published, without what says nothing of the model


CONFIGS = {
    "mamba-2.8b": dict(
        **dict(architectures=["MambaForCausalLM"], bos_token_id=0, conv_kernel=4, eos_token_id=0, expand=2),
        **dict(fused_add_norm=True, hidden_act="silu", hidden_size=2560, initializer_range=0.1, n_layer=64),
        **dict(intermediate_size=5120, layer_norm_epsilon=1e-05, model_type="mamba", num_hidden_layers=64),
        **dict(pad_token_id=0, pad_vocab_size_multiple=8, rescale_prenorm_residual=False, residual_in_fp32=True),
        **dict(rms_norm=True, state_size=16, time_step_floor=0.0001, time_step_init_scheme="random"),
        **dict(time_step_max=0.1, time_step_min=0.001, time_step_rank=160, time_step_scale=1.0, use_bias=False),
        **dict(torch_dtype="float32", transformers_version="4.39.0.dev0", use_cache=True, use_conv_bias=True),
        **dict(vocab_size=50280, max_position_embeddings=2048),  # the last is not in the published file
    ),
}


@pytest.mark.parametrize("size", CONFIGS)
def test_a_published_config_is_read_as_its_size(size):
    Model, published = BY_TYPE[CONFIGS[size]["model_type"]]
    assert Model.Config(**read_config(published, CONFIGS[size])) == SIZES[Model][size]


def test_a_recurrent_model_whose_config_names_no_length_reads_any():
    config = {name: value for name, value in CONFIGS["mamba-2.8b"].items() if name != "max_position_embeddings"}
    _, published = BY_TYPE["mamba"]
    assert read_config(published, config)["max_seq_len"] == 1_048_576


@pytest.mark.parametrize(
    "name, size, parameters",
    [
        ("mamba_lm", "mamba-130m", 129_135_360),
        ("mamba_lm", "mamba-2.8b", 2_768_345_600),
        ("mamba2_lm", "mamba2-130m", 128_989_632),
        ("mamba2_lm", "mamba2-2.7b", 2_702_599_680),
        ("mamba2_lm", "mamba-codestral-7b", 7_285_403_648),
    ],
)
def test_published_sizes_have_their_number_of_parameters(name, size, parameters):
    Model = MODELS[name]
    with torch.device("meta"):
        model = Model(SIZES[Model][size])
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize("name", ["mamba_lm", "mamba2_lm"])
def test_a_state_does_not_grow_with_the_text(name):
    Model = MODELS[name]
    with torch.device("meta"):
        model = Model(Model.Config())
    assert cache_bytes(model, 100) == cache_bytes(model, 8000)
