"""Mamba, Mamba-2 and the hybrids built on them against transformers: logits, padding, text, gradients, export."""

from dataclasses import replace

import pytest
import torch
from conftest import tiny_model
from parity import assert_parity, assert_same_logits, draw_tokens, original, twins
from safetensors.torch import load_file, save_file
from test_families import rewrite

from llm.analysis.accounting import active_parameters, cache_bytes
from llm.hub.maps import BY_TYPE, SIZES
from llm.hub.tables import PretrainedError, read_config
from llm.models import MODELS
from llm.pretrained import export_pretrained, load_pretrained

NO_ATTENTION = {"num_attention_heads": None, "num_key_value_heads": None}
MAMBA = {**NO_ATTENTION, "intermediate_size": 64, "state_size": 8}
MAMBA2 = {**MAMBA, "num_heads": 4, "head_dim": 16, "n_groups": 2}
JAMBA = {
    **dict(attn_layer_period=4, attn_layer_offset=2, num_experts=4, num_experts_per_tok=2),
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
    **dict(ssm_multipliers=[0.35, 0.25, 0.4, 0.5, 0.3], mamba_norm_before_gate=False),  # about as small as published
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
    "falcon_h1, one multiplier": (
        "FalconH1ForCausalLM",
        dict(num_hidden_layers=2, mamba_d_ssm=None, mamba_n_heads=4, mamba_d_state=8, ssm_out_multiplier=0.25)
        | dict(rope_parameters=dict(rope_type="default", rope_theta=1e11)),
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
    """A chunk has 64 tokens here and 32 there. In float64: fp32 rounds 150 tokens differently in another order."""
    theirs = original(architecture, **config, max_position_embeddings=256)
    theirs.save_pretrained(tmp_path)
    for module in theirs.modules():
        if hasattr(module, "chunk_size"):
            module.chunk_size = 32
    assert_same_logits(theirs.double(), load_pretrained(tmp_path).double(), n_tokens=150, atol=1e-5)


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
        ("JambaForCausalLM", {"mamba_proj_bias": True}, "mamba_proj_bias = True"),
        ("JambaForCausalLM", {"mamba_inner_layernorms": False}, "mamba_inner_layernorms = False"),
        ("JambaForCausalLM", {"attn_layer_offset": 4}, "attention_offset = 4 must lie between 0 and .* = 3"),
        ("NemotronHForCausalLM", {"layers_block_type": ["mamba", "conv"]}, "layers_block_type .*conv.*known are"),
        ("NemotronHForCausalLM", {"mlp_hidden_act": "silu"}, "mlp_hidden_act = 'silu'"),
        ("NemotronHForCausalLM", {"tie_word_embeddings": True}, "tie_word_embeddings = True"),
        ("NemotronHForCausalLM", {"mamba_num_groups": 4}, "mamba_num_groups = 4: this model knows 2 only"),
        ("FalconH1ForCausalLM", {"mamba_rms_norm": True, "mamba_norm_before_gate": True}, "norm_before_gate = True"),
        ("FalconH1ForCausalLM", {"mamba_d_ssm": 50}, "mamba_d_head times mamba_n_heads = 48: .* knows 50 only"),
        ("FalconH1ForCausalLM", {"ssm_multipliers": [1.0]}, "ssm_multipliers = .*needs 5 numbers"),
        ("FalconH1ForCausalLM", {"time_step_limit": [0.0, 0.5]}, "time_step_limit .*steps of any size"),
    ],
)
def test_a_setting_that_changes_the_result_is_an_error_that_names_it(tmp_path, architecture, fields, says):
    original(architecture, **FIRST[architecture]).save_pretrained(tmp_path)
    rewrite(tmp_path, **fields)
    with pytest.raises(PretrainedError, match=says):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    "spelled",
    [
        dict(hybrid_override_pattern="M-*E"),
        dict(layers_block_type=["mamba", "mlp", "attention", "moe"], num_hidden_layers=4),
        dict(layers_block_type=["linear_attention", "mlp", "full_attention", "moe"]),
    ],
)
def test_nemotrons_pattern_is_letters_or_words(tmp_path, spelled):
    theirs, _ = twins(tmp_path, "NemotronHForCausalLM", **NEMOTRON)
    rewrite(tmp_path / "theirs", without=["layers_block_type", "hybrid_override_pattern"])
    rewrite(tmp_path / "theirs", **spelled)
    ours = load_pretrained(tmp_path / "theirs")
    assert ours.config.pattern == "M-*E" and ours.config.n_layers == 4
    assert_same_logits(theirs, ours)


def test_nemotrons_prediction_module_is_passed_over(tmp_path):
    theirs, _ = twins(tmp_path, "NemotronHForCausalLM", **NEMOTRON)
    file = tmp_path / "theirs" / "model.safetensors"
    save_file(load_file(file) | {"mtp.layers.0.norm.weight": torch.ones(32)}, file, metadata={"format": "pt"})
    assert_same_logits(theirs, load_pretrained(tmp_path / "theirs"))


def test_a_nemotron_with_a_tied_head_is_not_exported(tmp_path):
    model = tiny_model("nemotron_h", tie_embeddings=True)
    with pytest.raises(PretrainedError, match=r"ties no head.*--model\.tie-embeddings"):
        export_pretrained(model, tmp_path / "out")


@torch.no_grad()
def test_a_short_step_is_lengthened_in_every_form():
    """In transformers in a prompt only. Without the limit the logits would differ."""
    model = tiny_model("nemotron_h", pattern="M", dt_min=0.7)
    tokens, cache = draw_tokens(24), model.make_cache(2, 24)
    steps = torch.cat([model(token, cache) for token in tokens.split(1, 1)], 1)
    torch.testing.assert_close(steps, model(tokens), rtol=0, atol=1e-10)
    without = type(model)(replace(model.config, dt_min=0.0)).double().eval()
    without.load_state_dict(model.state_dict())
    assert (without(tokens) - steps).abs().max() > 0.01


def test_a_layer_pattern_of_other_letters_is_refused():
    with pytest.raises(ValueError, match=r"pattern = 'MX'.*--model\.pattern"):
        MODELS["nemotron_h"].Config(pattern="MX")


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
    "jamba-v0.1": dict(
        **dict(architectures=["JambaForCausalLM"], attention_dropout=0.0, attn_layer_offset=4, attn_layer_period=8),
        **dict(expert_layer_offset=1, expert_layer_period=2, hidden_act="silu", hidden_size=4096),
        **dict(initializer_range=0.02, intermediate_size=14336, mamba_conv_bias=True, mamba_d_conv=4),
        **dict(mamba_d_state=16, mamba_dt_rank=256, mamba_expand=2, mamba_proj_bias=False),
        **dict(max_position_embeddings=262144, model_type="jamba", num_attention_heads=32, num_experts=16),
        **dict(num_experts_per_tok=2, num_hidden_layers=32, num_key_value_heads=8, num_logits_to_keep=1),
        **dict(output_router_logits=False, rms_norm_eps=1e-06, router_aux_loss_coef=0.001, sliding_window=None),
        **dict(tie_word_embeddings=False, use_cache=True, use_mamba_kernels=True, vocab_size=65536),
    ),
    "nemotron-h-8b": dict(
        **dict(architectures=["NemotronHForCausalLM"], attention_bias=False, attention_head_dim=128, chunk_size=256),
        **dict(conv_kernel=4, expand=2, hidden_dropout=0.0, hidden_size=4096, intermediate_size=21504),
        **dict(hybrid_override_pattern="M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"),
        **dict(layer_norm_epsilon=1e-05, mamba_head_dim=64, mamba_hidden_act="silu", mamba_num_heads=128),
        **dict(mamba_proj_bias=False, max_position_embeddings=8192, mlp_bias=False, mlp_hidden_act="relu2"),
        **dict(model_type="nemotron_h", n_groups=8, num_attention_heads=32, num_hidden_layers=52),
        **dict(num_key_value_heads=8, num_logits_to_keep=1, rescale_prenorm_residual=True, residual_in_fp32=False),
        **dict(rms_norm_eps=1e-05, sliding_window=None, ssm_state_size=128, tie_word_embeddings=False),
        **dict(use_bias=False, use_cache=True, use_conv_bias=True, use_mamba_kernels=True, vocab_size=131072),
    ),
    "nemotron-3-nano-30b-a3b": dict(
        **dict(architectures=["NemotronHForCausalLM"], attention_bias=False, chunk_size=128, conv_kernel=4),
        **dict(expand=2, head_dim=128, hidden_dropout=0.0, hidden_size=2688, intermediate_size=1856),
        **dict(hybrid_override_pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"),
        **dict(layer_norm_epsilon=1e-05, mamba_head_dim=64, mamba_hidden_act="silu", mamba_num_heads=64),
        **dict(mamba_proj_bias=False, mamba_ssm_cache_dtype="float32", max_position_embeddings=262144),
        **dict(mlp_bias=False, mlp_hidden_act="relu2", model_type="nemotron_h", moe_intermediate_size=1856),
        **dict(moe_shared_expert_intermediate_size=3712, n_group=1, n_groups=8, n_routed_experts=128),
        **dict(n_shared_experts=1, norm_eps=1e-05, norm_topk_prob=True, num_attention_heads=32),
        **dict(num_experts_per_tok=6, num_hidden_layers=52, num_key_value_heads=2, partial_rotary_factor=1.0),
        **dict(residual_in_fp32=False, rope_theta=10000, routed_scaling_factor=2.5, sliding_window=None),
        **dict(ssm_state_size=128, tie_word_embeddings=False, time_step_floor=0.0001, time_step_max=0.1),
        **dict(time_step_min=0.001, topk_group=1, use_bias=False, use_conv_bias=True, vocab_size=131072),
    ),
    "falcon-h1-0.5b": dict(
        **dict(architectures=["FalconH1ForCausalLM"], attention_bias=False, attention_in_multiplier=1.0),
        **dict(attention_out_multiplier=0.9375, attn_layer_indices=None, embedding_multiplier=5.656854249492381),
        **dict(head_dim=64, hidden_act="silu", hidden_size=1024, intermediate_size=2048, mamba_d_ssm=1536),
        **dict(key_multiplier=0.39062499999999994, lm_head_multiplier=0.0390625, mamba_chunk_size=128),
        **dict(mamba_conv_bias=True, mamba_d_conv=4, mamba_d_head=64, mamba_d_state=128, mamba_expand=2),
        **dict(mamba_n_groups=1, mamba_n_heads=24, mamba_norm_before_gate=False, mamba_proj_bias=False),
        **dict(mamba_rms_norm=False, mamba_use_mlp=True, max_position_embeddings=16384, mlp_bias=False),
        **dict(mlp_multipliers=[0.8838834764831844, 0.5859375], model_type="falcon_h1", num_attention_heads=8),
        **dict(num_hidden_layers=36, num_key_value_heads=2, projectors_bias=False, rms_norm_eps=1e-5),
        **dict(rope_scaling=None, rope_theta=100000000000.0, ssm_in_multiplier=1.25, vocab_size=32784),
        **dict(ssm_multipliers=[0.3535533905932738, 0.25, 0.3535533905932738, 0.5, 0.3535533905932738]),
        **dict(ssm_out_multiplier=0.23570226039551587, tie_word_embeddings=False, torch_dtype="bfloat16"),
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
        ("mamba2_lm", "codestral-mamba-7b", 7_285_403_648),
        ("jamba", "jamba-v0.1", 51_570_323_328),
        ("jamba", "jamba-1.5-large", 398_555_145_696),
        ("nemotron_h", "nemotron-h-8b", 8_100_852_736),
        ("nemotron_h", "nemotron-nano-9b-v2", 8_888_227_328),
        ("nemotron_h", "nemotron-3-nano-30b-a3b", 31_577_937_344),
        ("falcon_h1", "falcon-h1-0.5b", 521_411_104),
    ],
)
def test_published_sizes_have_their_number_of_parameters(name, size, parameters):
    Model = MODELS[name]
    with torch.device("meta"):
        model = Model(SIZES[Model][size])
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize(
    "name, size, active",
    [("jamba", "jamba-v0.1", 12), ("jamba", "jamba-1.5-large", 94), ("nemotron_h", "nemotron-3-nano-30b-a3b", 3.6)],
)
def test_experts_leave_as_few_active_as_their_cards_say(name, size, active):
    with torch.device("meta"):
        model = MODELS[name](SIZES[MODELS[name]][size])
    assert active_parameters(model) / 1e9 == pytest.approx(active, rel=0.01)


@pytest.mark.parametrize("name", ["mamba_lm", "mamba2_lm"])
def test_a_state_does_not_grow_with_the_text(name):
    Model = MODELS[name]
    with torch.device("meta"):
        model = Model(Model.Config())
    assert cache_bytes(model, 100) == cache_bytes(model, 8000)
