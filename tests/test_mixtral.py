"""Mixtral and Qwen3-MoE are transformers' models, with experts stored one by one or stacked."""

import json

import pytest
import torch
from conftest import tiny_model
from parity import assert_parity, assert_same_logits, original, twins
from safetensors import safe_open

from llm.analysis.accounting import active_parameters
from llm.hub.maps import PUBLISHED as MAPS
from llm.hub.maps import SIZES
from llm.hub.tables import PretrainedError, read_config
from llm.models.case_studies.mixtral import Mixtral
from llm.models.case_studies.qwen3_moe import Qwen3MoE
from llm.pretrained import export_pretrained, load_pretrained

SHAPE = dict(
    **dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1),
    **dict(intermediate_size=20, num_experts_per_tok=2, rms_norm_eps=1e-3),
)
MIXTRAL = dict(architecture="MixtralForCausalLM", num_local_experts=5, **SHAPE)
QWEN = dict(architecture="Qwen3MoeForCausalLM", num_experts=5, moe_intermediate_size=12, head_dim=16, **SHAPE)
YARN = dict(rope_type="yarn", rope_theta=5e3, factor=4.0, original_max_position_embeddings=16)
CASES = {
    "mixtral": (MIXTRAL, {}),
    "mixtral, wide heads, a window": (MIXTRAL, dict(head_dim=16, num_key_value_heads=3, sliding_window=6)),
    "mixtral, every expert for each token, tied": (MIXTRAL, dict(num_experts_per_tok=5, tie_word_embeddings=True)),
    "mixtral, linear scaling": (MIXTRAL, dict(rope_parameters={"rope_type": "linear", "rope_theta": 5e3, "factor": 3})),
    "qwen3_moe": (QWEN, dict(norm_topk_prob=True)),
    "qwen3_moe, weights as they are, tied": (QWEN, dict(norm_topk_prob=False, tie_word_embeddings=True)),
    "qwen3_moe, yarn": (QWEN | dict(head_dim=32), dict(rope_parameters=YARN)),
    "qwen3_moe, a dense layer, as many key heads": (QWEN, dict(num_key_value_heads=3, mlp_only_layers=[0])),
    "qwen3_moe, experts in every second layer": (
        QWEN,
        dict(decoder_sparse_step=2, mlp_only_layers=[3], num_hidden_layers=4, norm_topk_prob=True),
    ),
}


@pytest.mark.parametrize("family, config", CASES.values(), ids=CASES)
def test_logits_gradients_generation_and_export_are_those_of_transformers(tmp_path, family, config):
    assert_parity(tmp_path, **family | config)


def test_a_qwen3_moe_config_without_head_dim_has_narrow_heads(tmp_path):
    family = {name: value for name, value in QWEN.items() if name != "head_dim"}
    theirs, ours = twins(tmp_path, **family)
    assert ours.config.head_dim is None
    assert_same_logits(theirs, ours)


@pytest.mark.parametrize("family", [MIXTRAL, QWEN | {"mlp_only_layers": [0]}], ids=["mixtral", "qwen3_moe"])
def test_experts_stored_stacked_are_the_ones_stored_one_by_one(tmp_path, family):
    theirs, names = original(**family), {}
    for folder, one_by_one in (("published", True), ("stacked", False)):
        theirs.save_pretrained(tmp_path / folder, save_original_format=one_by_one)
        assert_same_logits(theirs, load_pretrained(tmp_path / folder))
        names[folder] = stored_names(tmp_path / folder)
    assert any(name.endswith("experts.gate_up_proj") for name in names["stacked"])
    export_pretrained(load_pretrained(tmp_path / "stacked"), tmp_path / "ours")
    assert stored_names(tmp_path / "ours") == names["published"]


def stored_names(folder) -> set[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return set(file.keys())


PUBLISHED = dict(
    **dict(attention_dropout=0.0, hidden_act="silu", initializer_range=0.02, output_router_logits=False),
    **dict(rope_theta=1000000.0, sliding_window=None, tie_word_embeddings=False, torch_dtype="bfloat16"),
    **dict(transformers_version="4.51.0", use_cache=True, bos_token_id=1, eos_token_id=2),
)
MIXTRAL_8X22B = dict(
    **dict(architectures=["MixtralForCausalLM"], hidden_size=6144, intermediate_size=16384, model_type="mixtral"),
    **dict(max_position_embeddings=65536, num_attention_heads=48, num_experts_per_tok=2, num_hidden_layers=56),
    **dict(num_key_value_heads=8, num_local_experts=8, rms_norm_eps=1e-05, router_aux_loss_coef=0.001),
    **dict(vocab_size=32000),
)
QWEN3_30B = dict(  # use_qk_norm as in Qwen3-Coder
    use_qk_norm=True,
    **dict(architectures=["Qwen3MoeForCausalLM"], attention_bias=False, decoder_sparse_step=1, head_dim=128),
    **dict(hidden_size=2048, intermediate_size=6144, max_position_embeddings=40960, max_window_layers=48),
    **dict(mlp_only_layers=[], model_type="qwen3_moe", moe_intermediate_size=768, norm_topk_prob=True),
    **dict(num_attention_heads=32, num_experts=128, num_experts_per_tok=8, num_hidden_layers=48),
    **dict(num_key_value_heads=4, rms_norm_eps=1e-06, rope_scaling=None, router_aux_loss_coef=0.001),
    **dict(use_sliding_window=False, vocab_size=151936),
)


@pytest.mark.parametrize(
    "Model, config, size",
    [
        (Mixtral, MIXTRAL_8X22B, SIZES[Mixtral]["mixtral-8x22b"]),
        (Qwen3MoE, QWEN3_30B, SIZES[Qwen3MoE]["qwen3-30b-a3b"]),
    ],
)
def test_the_config_as_published_is_that_of_sizes(Model, config, size):
    assert Model.Config(**read_config(MAPS[Model], PUBLISHED | config)) == size


@pytest.mark.parametrize(
    "Model, config, parameters, active",
    [
        (Mixtral, SIZES[Mixtral]["mixtral-8x7b"], 46_702_792_704, 12.9),
        (Mixtral, SIZES[Mixtral]["mixtral-8x22b"], 140_620_634_112, 39.2),
        (Qwen3MoE, SIZES[Qwen3MoE]["qwen3-30b-a3b"], 30_532_122_624, 3.35),
        (Qwen3MoE, SIZES[Qwen3MoE]["qwen3-235b-a22b"], 235_093_634_560, 22.2),
    ],
)
def test_published_sizes_have_the_published_number_of_parameters(Model, config, parameters, active):
    with torch.device("meta"):
        model = Model(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert active_parameters(model) == pytest.approx(active * 1e9, rel=5e-3)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_the_loss_that_balances_experts_is_on_in_training_only(kind, tokens):
    model = tiny_model(kind)
    assert model.loss(tokens)[1]["aux"] == 0
    assert model.train().loss(tokens)[1]["aux"] > 0


def test_a_dense_layer_outside_the_model_is_an_error_that_names_the_flag():
    with pytest.raises(ValueError, match=r"\[4\].*0 to 3 .*--model.dense-layers"):
        Qwen3MoE.Config(dense_layers=(0, 4))


@pytest.mark.parametrize(
    "family, field, value",
    [
        (MIXTRAL, "hidden_act", "gelu"),
        (QWEN, "attention_bias", "yes"),
        (QWEN, "use_sliding_window", 1),
        (QWEN, "shared_expert_intermediate_size", 16),
        (QWEN, "decoder_sparse_step", None),
        (QWEN, "decoder_sparse_step", 0),
        (QWEN, "decoder_sparse_step", "2"),
        (QWEN, "mlp_only_layers", 1),
        (QWEN, "use_qk_norm", False),
        (QWEN, "num_local_experts", None),
    ],
)
def test_a_setting_that_changes_the_result_is_an_error_that_names_it(tmp_path, family, field, value):
    original(**family).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, field: value}), encoding="utf-8")
    with pytest.raises(PretrainedError, match=field):
        load_pretrained(tmp_path)
