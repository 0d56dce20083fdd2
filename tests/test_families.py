"""Olmo 3, SmolLM3, Gemma 1, Phi-3, Ministral 3, Qwen2-MoE, GLM-4.5, Kimi K2, Qwen3-VL's text against transformers.

Logits past every window and trained length, greedy text, gradients and export; and the settings of older families that
only some checkpoints have.
"""

import json

import pytest
import torch
from conftest import tiny_model
from parity import assert_parity, assert_same_logits, draw_tokens, original, rewrite, twins
from safetensors.torch import load_file, save_file

from llm.analysis.accounting import active_parameters
from llm.hub.maps import SIZES
from llm.hub.tables import PretrainedError
from llm.models import MODELS
from llm.pretrained import export_pretrained, load_pretrained

FULL, LOCAL = "full_attention", "sliding_attention"
LONG = {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", **LONG}
PLAIN = {"rope_type": "default", "rope_theta": 500.0}
SHORT = {"max_position_embeddings": 64, "head_dim": 32}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 12}
QWEN2_MOE = {**EXPERTS, "num_experts": 5, "shared_expert_intermediate_size": 20}
GLM = {**EXPERTS, "n_routed_experts": 8, "head_dim": 12, "first_k_dense_replace": 1, "routed_scaling_factor": 1.7}
LONGROPE = {
    **dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0, 1.1, 1.2, 1.3, 1.5, 2.0]),
    **dict(long_factor=[1.0, 1.5, 2.0, 3.0, 5.0, 8.0], original_max_position_embeddings=64),
}
PHI = {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1, "pad_token_id": None}
MINISTRAL = {"llama_4_scaling_beta": 0.1, "mscale": 1.0, "mscale_all_dim": 1.0}
CASES = {
    "olmo3": ("Olmo3ForCausalLM", {"num_hidden_layers": 4, "sliding_window": 6, "head_dim": 8}),
    "olmo3, yarn where all is seen": (
        "Olmo3ForCausalLM",
        {
            **dict(layer_types=[LOCAL, FULL, LOCAL], sliding_window=6, attention_bias=True, **SHORT),
            "rope_parameters": {FULL: YARN, LOCAL: {"rope_type": "default", "rope_theta": 1e4}},
        },
    ),
    "smollm3": ("SmolLM3ForCausalLM", {"num_hidden_layers": 4, "mlp_bias": True}),
    # without RoPE, a bias of the keys shifts all scores of a query and has no gradient
    "smollm3, biases": ("SmolLM3ForCausalLM", {"no_rope_layers": [1, 1, 1], "attention_bias": True}),
    "smollm3, its own layers, untied": (
        "SmolLM3ForCausalLM",
        dict(no_rope_layers=[0, 1, 1], tie_word_embeddings=False, rope_parameters=PLAIN),
    ),
    "gemma": ("GemmaForCausalLM", {"head_dim": 12}),
    "gemma, one key head, untied": (
        "GemmaForCausalLM",
        dict(head_dim=16, num_key_value_heads=1, tie_word_embeddings=False, rope_parameters=PLAIN),
    ),
    "phi3": ("Phi3ForCausalLM", {"sliding_window": 6, "pad_token_id": None}),
    "phi3, a part of each head": (
        "Phi3ForCausalLM",
        {**PHI, "rope_parameters": {**PLAIN, "partial_rotary_factor": 0.75}, "tie_word_embeddings": True},
    ),
    "ministral3": ("Ministral3ForCausalLM", {**SHORT, "rope_parameters": YARN | MINISTRAL}),
    "ministral3, a window": (
        "Ministral3ForCausalLM",
        {**SHORT, "sliding_window": 6, "rope_parameters": YARN | {"llama_4_scaling_beta": 0.5}},
    ),
    "qwen2_moe": ("Qwen2MoeForCausalLM", QWEN2_MOE),
    "qwen2_moe, dense layers, weights that sum to 1": (
        "Qwen2MoeForCausalLM",
        {**QWEN2_MOE, "mlp_only_layers": [0], "norm_topk_prob": True, "qkv_bias": False, "tie_word_embeddings": True},
    ),
    "glm4_moe": ("Glm4MoeForCausalLM", {**GLM, "attention_bias": True}),
    "glm4_moe, normed heads, groups": (
        "Glm4MoeForCausalLM",
        {**GLM, "use_qk_norm": True, "n_group": 4, "topk_group": 2, "norm_topk_prob": False, "head_dim": 16},
    ),
    # settings of older families
    "llama, biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "llama, longrope": (
        "LlamaForCausalLM",
        {"head_dim": 12, "rope_parameters": LONGROPE | {"factor": 4.0}},
    ),
    "llama, yarn of equal betas": ("LlamaForCausalLM", {**SHORT, "rope_parameters": YARN | {"beta_fast": 1.0}}),
    "qwen3, biases, windows from layer 1 on": (
        "Qwen3ForCausalLM",
        dict(head_dim=12, attention_bias=True, use_sliding_window=True, sliding_window=6, max_window_layers=1),
    ),
    "qwen2, windows in layers of its choice": (
        "Qwen2ForCausalLM",
        dict(use_sliding_window=True, sliding_window=6, layer_types=[LOCAL, FULL, LOCAL]),
    ),
    "qwen2, windows in no layer": ("Qwen2ForCausalLM", dict(use_sliding_window=True, max_window_layers=3)),
    "qwen3_moe, biases, a window": (
        "Qwen3MoeForCausalLM",
        {**EXPERTS, **dict(num_experts=5, head_dim=16, attention_bias=True, use_sliding_window=True, sliding_window=6)},
    ),
    "olmo2, biases": ("Olmo2ForCausalLM", {"attention_bias": True}),
    "gemma2 without ceilings": (
        "Gemma2ForCausalLM",
        dict(attn_logit_softcapping=None, final_logit_softcapping=None, head_dim=12, sliding_window=6),
    ),
    "gemma3 with ceilings": (
        "Gemma3ForCausalLM",
        dict(attn_logit_softcapping=1.5, final_logit_softcapping=2.0, head_dim=12, sliding_window=6),
    ),
}


@pytest.mark.parametrize("architecture, config", CASES.values(), ids=CASES)
def test_logits_gradients_generation_and_export_are_those_of_transformers(tmp_path, architecture, config):
    assert_parity(tmp_path, architecture, **config)


def test_longrope_equals_the_original_on_both_sides_of_the_trained_length(tmp_path):
    """Without a cache, whose keys keep the angles of their time."""
    settings = LONGROPE | {"partial_rotary_factor": 0.75, "original_max_position_embeddings": 16}
    theirs, ours = twins(
        tmp_path, "Phi3ForCausalLM", **PHI, original_max_position_embeddings=16, rope_parameters=settings
    )
    assert ours.config.rope_scaling["factor"] == 4.0 and ours.config.max_seq_len == 64
    for n_tokens in (12, 16, 17, 40):
        assert_same_logits(theirs, ours, n_tokens)


@torch.no_grad()
def test_longrope_gives_each_text_of_a_batch_the_angles_of_its_own_length():
    model = tiny_model("llama", head_dim=12, max_seq_len=64)
    rope = dict(LONGROPE, factor=4.0, original_max_position_embeddings=16)
    del rope["rope_theta"]
    model = type(model)(type(model).Config(**{**vars(model.config), "rope_scaling": rope})).double().eval()
    tokens, padding = draw_tokens(24), torch.tensor([0, 12])
    together = model(tokens, model.make_cache(2, 24, padding))
    torch.testing.assert_close(together[1:, 12:], model(tokens[1:, 12:]), rtol=0, atol=1e-5)


DEEPSEEK = dict(
    num_key_value_heads=None,
    **dict(q_lora_rank=20, kv_lora_rank=24, qk_nope_head_dim=10, qk_rope_head_dim=32, v_head_dim=14),
    **dict(moe_intermediate_size=16, n_routed_experts=8, num_experts_per_tok=3, n_group=1, topk_group=1),
    first_k_dense_replace=1,
)


def test_kimi_k2_is_a_deepseek_v3_whose_ramp_is_a_step(tmp_path):
    """transformers 5.23 does not know kimi_k2."""
    kimi = DEEPSEEK | {"rope_parameters": YARN | {"beta_fast": 1.0, "beta_slow": 1.0}}
    theirs, _ = twins(tmp_path, "DeepseekV3ForCausalLM", **kimi)
    rewrite(tmp_path / "theirs", model_type="kimi_k2", aux_loss_alpha=0.001, seq_aux=True, ep_size=1)
    assert_same_logits(theirs, load_pretrained(tmp_path / "theirs"))


def test_the_weights_of_deepseeks_experts_need_not_be_normalised(tmp_path):
    assert_parity(tmp_path, "DeepseekV3ForCausalLM", **DEEPSEEK, norm_topk_prob=False)


@pytest.mark.parametrize("without", [0, None])
@pytest.mark.parametrize("version", ["2", "3", "32"])
def test_deepseek_may_have_no_shared_expert(tmp_path, version, without):
    """Equal to one whose shared experts add nothing. transformers saves experts of width 0, others save none."""
    indexer = dict(num_key_value_heads=4, index_n_heads=8, index_head_dim=40, index_topk=6) if version == "32" else {}
    theirs = original(f"DeepseekV{version}ForCausalLM", **DEEPSEEK | indexer, n_shared_experts=1)
    for layer in theirs.model.layers[1:]:
        torch.nn.init.zeros_(layer.mlp.shared_experts.down_proj.weight)
    theirs.save_pretrained(tmp_path)
    rewrite(tmp_path, n_shared_experts=without)
    weights = load_file(tmp_path / "model.safetensors")
    for empty in (True, False):
        for name in [name for name in weights if "shared_experts" in name]:
            if empty:
                weights[name] = torch.zeros(0, 32)
            else:
                del weights[name]
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        ours = load_pretrained(tmp_path)
        assert ours.blocks[1].ffn.shared is None
        assert_same_logits(theirs, ours)


@torch.no_grad()
def test_qwen3_vl_is_read_as_the_qwen3_that_its_text_model_is(tmp_path):
    transformers = pytest.importorskip("transformers")
    rope = {"rope_type": "default", "rope_theta": 5e3, "mrope_section": [2, 2, 2], "mrope_interleaved": True}
    text = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    text |= dict(intermediate_size=48, head_dim=12, max_position_embeddings=64, rope_parameters=rope)
    vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32)
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision | {"deepstack_visual_indexes": [0]})
    torch.manual_seed(0)
    theirs = transformers.Qwen3VLForConditionalGeneration(config).float().eval()
    for parameter in theirs.parameters():
        parameter.normal_(std=0.3)
    theirs.save_pretrained(tmp_path)
    ours, tokens = load_pretrained(tmp_path), draw_tokens(40)
    assert type(ours) is MODELS["qwen3"]
    expected = theirs(input_ids=tokens, use_cache=False).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(tokens), expected, rtol=0, atol=1e-5 * expected.abs().max().item() + 2e-5)


@pytest.mark.parametrize("name", ["gelu", "gelu_python", "gelu_fast", "quick_gelu", "gelu_pytorch_tanh"])
def test_gpt2_may_have_another_gelu(tmp_path, name):
    only = {"num_key_value_heads": None, "intermediate_size": None, "activation_function": name}
    theirs, ours = twins(tmp_path, "GPT2LMHeadModel", **only)
    assert_same_logits(theirs, ours)
    export_pretrained(ours, tmp_path / "out")
    assert load_pretrained(tmp_path / "out").config == ours.config


# Lengths


@pytest.mark.parametrize(
    "scaling, longest",
    [
        ({"rope_type": "yarn", **LONG}, 64),
        ({"rope_type": "yarn", **LONG, "factor": 2.0}, 40),
        ({"rope_type": "yarn", "rope_theta": 1e4, "factor": 3.0}, 120),
        ({"rope_type": "yarn", **LONG, "factor": None}, 40),
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0}, 120),
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}, 40),
        ({"rope_type": "llama3", **LONG, "low_freq_factor": 1.0, "high_freq_factor": 4.0}, 40),
    ],
)
def test_a_scaled_model_reads_as_many_tokens_as_its_card_promises(tmp_path, scaling, longest):
    original("LlamaForCausalLM", head_dim=32).save_pretrained(tmp_path)
    rewrite(tmp_path, without=["rope_theta"], rope_parameters=scaling, max_position_embeddings=40)
    model = load_pretrained(tmp_path)
    assert model.config.max_seq_len == longest
    assert load_pretrained(tmp_path, max_seq_len=33).config.max_seq_len == 33
    longer = load_pretrained(tmp_path, max_seq_len=1000)
    assert longer.config.rope_scaling == model.config.rope_scaling and longer.config.max_seq_len == 1000


def test_a_table_of_positions_has_one_length(tmp_path):
    only = {"num_key_value_heads": None, "intermediate_size": None}
    original("GPT2LMHeadModel", **only).save_pretrained(tmp_path)
    assert load_pretrained(tmp_path, max_seq_len=64).config.max_seq_len == 64
    with pytest.raises(PretrainedError, match="max_seq_len = 65: this model has a table of 64 positions"):
        load_pretrained(tmp_path, max_seq_len=65)


def test_dual_chunk_attention_is_left_out_with_a_warning_up_to_where_it_begins(tmp_path):
    theirs, _ = twins(tmp_path, "Qwen2ForCausalLM")
    chunks = {"chunk_size": 32, "local_size": 8, "original_max_position_embeddings": 48}
    rewrite(tmp_path / "theirs", dual_chunk_attention_config=chunks)
    with pytest.warns(UserWarning, match="dual_chunk_attention_config.*up to 48 tokens"):
        ours = load_pretrained(tmp_path / "theirs")
    assert ours.config.max_seq_len == 48
    assert_same_logits(theirs, ours, 40)
    with pytest.warns(UserWarning), pytest.raises(PretrainedError, match="max_seq_len = 49 is beyond 48"):
        load_pretrained(tmp_path / "theirs", max_seq_len=49)


# What is passed over and what is refused


def test_notes_of_other_programs_and_a_stale_index_change_nothing(tmp_path):
    theirs = original("LlamaForCausalLM")
    theirs.save_pretrained(tmp_path)
    rewrite(tmp_path, internal_version="1.2", activation="silu", partial_rotary_factor=1.0)
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    assert_same_logits(theirs, load_pretrained(tmp_path))


@pytest.mark.parametrize(
    "architecture, fields, says",
    [
        ("LlamaForCausalLM", {"activation": "gelu"}, "activation = 'gelu'"),
        (
            "LlamaForCausalLM",
            {"partial_rotary_factor": 0.5},
            r"partial_rotary_factor = 0.5: this model turns whole heads",
        ),
        ("LlamaForCausalLM", {"rope_parameters": YARN | {"beta_slow": 40.0}}, "beta_slow = 40.0"),
        ("Qwen2ForCausalLM", {"layer_types": [LOCAL] * 3}, "use_sliding_window = False.*how long the window is"),
        ("Qwen2ForCausalLM", {"use_sliding_window": 1}, "use_sliding_window"),
        ("SmolLM3ForCausalLM", {"no_rope_layers": [1]}, "no_rope_layers"),
        ("SmolLM3ForCausalLM", {"no_rope_layers": None, "no_rope_layer_interval": 0}, "no_rope_layer_interval"),
        ("SmolLM3ForCausalLM", {"use_sliding_window": True}, "use_sliding_window"),
        ("Qwen2ForCausalLM", {"dual_chunk_attention_config": {"chunk_size": 4}}, "dual_chunk_attention_config"),
    ],
)
def test_a_setting_that_changes_the_result_is_an_error_that_names_it(tmp_path, architecture, fields, says):
    original(architecture).save_pretrained(tmp_path)
    rewrite(tmp_path, **fields)
    with pytest.raises(PretrainedError, match=says):
        load_pretrained(tmp_path)


def test_attn_factor_is_passed_over_with_a_warning_as_in_transformers(tmp_path):
    theirs = original("LlamaForCausalLM", rope_parameters=YARN | {"attn_factor": 2.0})
    theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"attn_factor = 2\.0, which is passed over, as transformers does"):
        ours = load_pretrained(tmp_path)
    assert_same_logits(theirs, ours)


# Sizes


@pytest.mark.parametrize(
    "name, size, parameters",
    [
        ("olmo3", "olmo3-7b", 7_298_011_136),
        ("smollm3", "smollm3-3b", 3_075_098_624),
        ("gemma", "gemma-2b", 2_506_172_416),
        ("gemma", "gemma-7b", 8_537_680_896),
        ("phi3", "phi3-mini-4k", 3_821_079_552),
        ("phi3", "phi4-mini", 3_836_021_760),
        ("phi3", "phi4", 14_659_507_200),
        ("ministral3", "ministral3-8b", 8_489_553_920),
        ("qwen2_moe", "qwen1.5-moe-a2.7b", 14_315_784_192),
        ("glm4_moe", "glm-4.5-air", 106_852_245_504),
        ("glm4_moe", "glm-4.5", 352_797_814_784),
        ("deepseek_v3", "kimi-k2", 1_026_408_209_408),
    ],
)
def test_published_sizes_have_their_number_of_parameters(name, size, parameters):
    Model = MODELS[name]
    with torch.device("meta"):
        model = Model(SIZES[Model][size])
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize(
    "name, size, active",
    [("qwen2_moe", "qwen1.5-moe-a2.7b", 2.7), ("glm4_moe", "glm-4.5-air", 12.5), ("deepseek_v3", "kimi-k2", 32.9)],
)
def test_experts_leave_as_few_active_as_their_cards_say(name, size, active):
    with torch.device("meta"):
        model = MODELS[name](SIZES[MODELS[name]][size])
    assert active_parameters(model) / 1e9 == pytest.approx(active, rel=0.1)
