"""Reading and writing published checkpoints: every layout, every refusal, and one stored tensor in memory at a time."""

import contextlib
import json
import os
import shutil
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import redraw, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from parity import EAGER, assert_as_precise_in_bf16, assert_same_logits, draw_tokens, logits, original, twins
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from training import write_corpus

from llm.config import TrainConfig
from llm.data.files import open_tokens
from llm.data.vocabulary import train_bpe
from llm.generate.__main__ import main as generate
from llm.generate.load import load_run
from llm.generate.text import encode_prompt, write
from llm.hub.folder import HubTensors, load_hub_tokenizer, stop_tokens
from llm.hub.load import find_model
from llm.hub.maps import PUBLISHED, SIZES
from llm.hub.quantized import FP4_VALUES, dequantize_fp8, dequantize_mxfp4
from llm.hub.rope import normalise
from llm.hub.tables import PretrainedError, deinterleave, join, plan, read_config, same, split, transpose
from llm.models import MODELS
from llm.models.case_studies.deepseek_v2 import DeepseekV2
from llm.models.case_studies.gemma import Gemma2
from llm.models.case_studies.llama import Llama
from llm.models.case_studies.mistral import Mistral
from llm.models.case_studies.mixtral import Mixtral
from llm.models.case_studies.qwen3 import Qwen2, Qwen3
from llm.modules.position_encoding.rope_settings import make_scaling
from llm.pretrained import export_pretrained, load_pretrained
from llm.pretrained import main as pretrained
from llm.training.loop import train

PAIRS = {
    name: (Model, PUBLISHED[Model])
    for name, Model in MODELS.items()
    if Model in PUBLISHED and not PUBLISHED[Model].own_code  # others have no class of transformers to compare with
}
SMALL = {"vocab_size": 97, "max_seq_len": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 48}


def tiny_llama(**overrides) -> Llama:
    torch.manual_seed(0)
    model = Llama(Llama.Config(**SMALL | {"tie_embeddings": False} | overrides)).eval()
    redraw(model)
    return model


@pytest.fixture
def folder(tmp_path):
    return export_pretrained(tiny_llama(), tmp_path / "hub")


def edit_config(folder, **changes) -> None:
    """Change fields of config.json; None takes a field away."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | changes
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not None}), encoding="utf-8")


def edit_weights(folder, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def same_parameters(one, other) -> bool:
    ones, others = one.state_dict(), other.state_dict()
    return ones.keys() == others.keys() and all(torch.equal(ones[name], others[name]) for name in ones)


# --- what a folder may look like


def test_what_was_exported_is_loaded_again_in_one_file_or_in_shards(tmp_path):
    model = tiny_llama()
    for bytes_, n_files in ((5_000_000, 1), (20_000, 4)):
        out = export_pretrained(model, tmp_path / str(bytes_), shard_bytes=bytes_)
        assert len(list(out.glob("*.safetensors"))) >= n_files
        assert (out / "model.safetensors.index.json").exists() == (n_files > 1)
        assert same_parameters(load_pretrained(out), model)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "20000", attn_implementation="eager").eval()
    tokens = draw_tokens(20)
    torch.testing.assert_close(logits(theirs, tokens), model(tokens).detach(), rtol=0, atol=2e-5)


def test_shards_that_transformers_writes_are_read(tmp_path):
    theirs = original("LlamaForCausalLM")
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    tokens = draw_tokens(20)
    torch.testing.assert_close(load_pretrained(tmp_path)(tokens).detach(), logits(theirs, tokens), rtol=0, atol=2e-5)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_files_of_each_precision_are_read_as_they_are_or_as_asked(tmp_path, stored):
    model = tiny_llama().to(stored)
    out = export_pretrained(model, tmp_path / "out")
    assert json.loads((out / "config.json").read_text(encoding="utf-8"))["dtype"] == str(stored).removeprefix("torch.")
    assert same_parameters(load_pretrained(out), model)
    wide = load_pretrained(out, dtype=torch.float64)
    assert same_parameters(wide, model.double())


SCALINGS = {
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 3.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": dict(factor=4.0, original_max_position_embeddings=16, low_freq_factor=1.0, high_freq_factor=4.0),
}
SCALED = {
    "MistralForCausalLM": {"head_dim": 32, "sliding_window": 6},
    "Qwen2ForCausalLM": {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1},
    "Qwen3ForCausalLM": {"head_dim": 32},
    "Olmo2ForCausalLM": {"head_dim": 32},
    "Gemma2ForCausalLM": {"head_dim": 32, "query_pre_attn_scalar": 20, "sliding_window": 6},
    "MixtralForCausalLM": {"head_dim": 32, "num_local_experts": 5},
    "Qwen3MoeForCausalLM": {"head_dim": 32, "num_experts": 5, "moe_intermediate_size": 12, "num_experts_per_tok": 2},
    "GptOssForCausalLM": {"head_dim": 32, "num_local_experts": 5, "sliding_window": 6},
    "DeepseekV2ForCausalLM": {"qk_rope_head_dim": 32, "num_experts_per_tok": 2, "num_key_value_heads": None},
    "DeepseekV3ForCausalLM": {"qk_rope_head_dim": 32, "n_routed_experts": 16, "num_key_value_heads": None},
}


@pytest.mark.parametrize("rope_type", SCALINGS)
@pytest.mark.parametrize("architecture", SCALED)
def test_scaled_positions_are_those_of_transformers(tmp_path, architecture, rope_type):
    """Beyond the trained length, too. Llama's are in test_llama.py."""
    rope = {"rope_type": rope_type, "rope_theta": 5e3, **SCALINGS[rope_type]}
    theirs, ours = twins(
        tmp_path, architecture, max_position_embeddings=16, rope_parameters=rope, **SCALED[architecture]
    )
    assert ours.config.rope_scaling["rope_type"] == rope_type
    assert_same_logits(theirs, ours)


BF16 = {
    "LlamaForCausalLM": {},
    "Qwen3ForCausalLM": {"head_dim": 12},
    "Olmo2ForCausalLM": {},
    "Gemma2ForCausalLM": {
        **dict(head_dim=12, query_pre_attn_scalar=12, sliding_window=6),
        **dict(attn_logit_softcapping=1.5, final_logit_softcapping=2.0),
    },
    "Gemma3ForCausalLM": {"head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": 6},
    # every expert for each token: rounding may decide a near tie of two experts otherwise, here as in transformers
    "MixtralForCausalLM": {"num_local_experts": 4, "num_experts_per_tok": 4},
    "GptOssForCausalLM": {"head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 4, "sliding_window": 6},
    "DeepseekV3ForCausalLM": {
        **dict(qk_rope_head_dim=32, num_key_value_heads=None, first_k_dense_replace=1),
        **dict(n_routed_experts=4, num_experts_per_tok=4, n_group=1, topk_group=1),
    },
}


@pytest.mark.parametrize("architecture", BF16)
def test_in_bf16_logits_are_as_precise_as_those_of_transformers(tmp_path, architecture):
    assert_as_precise_in_bf16(tmp_path, original(architecture, **BF16[architecture]))


def test_a_tied_head_may_be_in_the_file_a_second_time_but_no_other_one(tmp_path):
    model = tiny_llama(tie_embeddings=True)
    out = export_pretrained(model, tmp_path / "out")
    assert "lm_head.weight" not in load_file(out / "model.safetensors")
    edit_weights(out, lambda weights: weights.update({"lm_head.weight": weights["model.embed_tokens.weight"].clone()}))
    assert same_parameters(load_pretrained(out), model)
    edit_weights(out, lambda weights: weights["lm_head.weight"].add_(1))
    with pytest.raises(PretrainedError, match=r"ties the head to the embedding, but lm_head.weight is another matrix"):
        load_pretrained(out)


def test_angles_that_old_files_store_are_not_needed(folder):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_weights(folder, lambda weights: weights.update({name: torch.zeros(4)}))
    load_pretrained(folder)


def test_loading_holds_one_stored_tensor_at_a_time(folder, monkeypatch):
    live, most = set(), []
    stored = HubTensors.stored

    def watched(self, name):
        tensor = stored(self, name)
        live.add(name)
        weakref.finalize(tensor, live.discard, name)
        most.append(len(live))
        return tensor

    monkeypatch.setattr(HubTensors, "stored", watched)
    load_pretrained(folder)
    assert len(most) == 2 * 9 + 3 and max(most) == 1


# --- what is refused


def drop_key(weights):
    del weights["model.layers.1.mlp.up_proj.weight"]


def add_key(weights):
    weights["model.layers.2.mlp.up_proj.weight"] = torch.zeros(3)


def cut_key(weights):
    weights["model.norm.weight"] = weights["model.norm.weight"][:-1].clone()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (drop_key, r"1 missing: model\.layers\.1\.mlp\.up_proj\.weight"),
        (add_key, r"1 left over: model\.layers\.2\.mlp\.up_proj\.weight"),
        (cut_key, r"1 of another shape: model\.norm\.weight \(31,\), not \(32,\)"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder, change, says):
    edit_weights(folder, change)
    with pytest.raises(PretrainedError, match=says):
        load_pretrained(folder)


def test_a_missing_and_a_truncated_shard_are_named(tmp_path):
    folder = export_pretrained(tiny_llama(), tmp_path / "out", shard_bytes=20_000)
    second = sorted(folder.glob("*.safetensors"))[1]
    raw = second.read_bytes()
    second.write_bytes(raw[:-100])
    with pytest.raises(PretrainedError, match=rf"{second.name} cannot be read: .*download it again"):
        load_pretrained(folder)
    second.write_bytes(raw[:5])
    with pytest.raises(PretrainedError, match=rf"{second.name} cannot be read: .*download it again"):
        load_pretrained(folder)
    second.unlink()
    with pytest.raises(PretrainedError, match=rf"{second.name} is missing.*download it again"):
        load_pretrained(folder)


@pytest.mark.parametrize("newer", [0, -1])
def test_a_tensor_that_two_shards_hold_is_taken_from_the_one_that_the_index_names(tmp_path, newer):
    model = tiny_llama()
    folder = export_pretrained(model, tmp_path / "out", shard_bytes=20_000)
    where = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
    shards = sorted(folder.glob("*.safetensors"))
    name = next(name for name, file in where.items() if file != shards[newer].name)
    save_file(load_file(shards[newer]) | {name: load_file(folder / where[name])[name] + 1}, shards[newer])
    assert same_parameters(load_pretrained(folder), model)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_pointer_of_git_lfs_in_place_of_a_file_is_named(hub, name):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 988097824\n"
    (hub / name).write_text(pointer, encoding="utf-8")
    with pytest.raises(PretrainedError, match=rf"{name} is a Git LFS pointer.*install git-lfs.*git lfs pull"):
        load_run(hub, torch.device("cpu"))


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {"model.norm.weight": 1}}])
def test_an_index_without_a_map_is_refused(folder, index):
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(PretrainedError, match=r"index\.json has no weight_map"):
        load_pretrained(folder)


def test_a_config_without_a_model_type_says_so(folder):
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    del config["model_type"]
    file.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(PretrainedError, match=r"config\.json has no model_type.*one of .*llama"):
        load_pretrained(folder)


def test_an_index_cannot_name_files_elsewhere(tmp_path):
    folder = export_pretrained(tiny_llama(), tmp_path / "out", shard_bytes=20_000)
    shutil.copy(next(folder.glob("*.safetensors")), tmp_path / "x.safetensors")
    index = {"weight_map": {"model.norm.weight": "../x.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(PretrainedError, match="is missing"):
        load_pretrained(folder)


def test_pickled_weights_are_refused_unopened(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(PretrainedError, match=r"pytorch_model\.bin only.*can run code.*take the \.safetensors"):
        load_pretrained(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(PretrainedError, match=r"neither model\.safetensors nor"):
        load_pretrained(folder)


def test_a_folder_without_a_readable_config_is_refused(folder):
    for text in ("{", "[]", '"llama"'):
        (folder / "config.json").write_text(text, encoding="utf-8")
        with pytest.raises(PretrainedError, match=r"config\.json"):
            load_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(PretrainedError, match=r"config\.json cannot be read"):
        load_pretrained(folder)


YARN = {"rope_type": "yarn", "factor": 2.0}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "bloom"}, r"'bloom' is not known; known are .*llama, .*ministral3, mistral"),
        ({"model_type": "gemma3"}, r"sees images.*gemma3_text"),
        ({"hidden_act": "gelu"}, r"hidden_act = 'gelu': this model knows 'silu' only"),
        ({"attention_bias": True}, r"asks for:\n.*8 missing: model\.layers\.0\.self_attn\.k_proj\.bias"),
        ({"logits_scaling": 8.0}, r"sets logits_scaling = 8\.0, which this code does not know"),
        ({"num_key_value_heads": 3}, r"n_kv_heads = 3 does not divide n_heads = 4"),
        ({"hidden_size": "wide"}, r"sets hidden_size to \"wide\": this model needs a whole number"),
        ({"num_hidden_layers": [1]}, r"sets num_hidden_layers to \[1\]: this model needs a whole number"),
        ({"num_hidden_layers": 1.5}, r"sets num_hidden_layers to 1\.5: this model needs a whole number"),
        ({"num_attention_heads": True}, r"sets num_attention_heads to true: this model needs a whole number"),
        ({"rms_norm_eps": "1e-5"}, r"sets rms_norm_eps to \"1e-5\": this model needs a number"),
        ({"tie_word_embeddings": 1}, r"sets tie_word_embeddings to 1: this model needs true or false"),
        ({"rope_theta": "1e4"}, r"sets rope_theta to \"1e4\": this model needs a number"),
        ({"rope_theta": 0}, r"theta = 0 must be positive"),
        ({"rope_scaling": "linear"}, r"sets rope_scaling to \"linear\": this model needs an object"),
        ({"rope_scaling": {"type": "linear", "factor": "4"}}, r"'linear' sets factor to '4': that is no value"),
        ({"rope_scaling": {"type": "linear", "factor": True}}, r"'linear' sets factor to True: that is no value"),
        ({"rope_scaling": {"rope_type": ["linear"]}}, r"rope_type = \['linear'\] is not supported"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, r"full_attention of RoPE to .*yarn.*a number"),
        ({"rope_parameters": {"rope_theta": [1]}}, r"sets rope_theta to \[1\]: this model needs a number"),
        ({"rope_interleaved": True}, r"sets rope_interleaved = True, which this code does not know"),
        ({"model_type": ["llama"]}, r"\['llama'\].* is not known"),
        ({"quantization_config": "fp8"}, r"quantization_config fp8 is not read"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": 128}}, r"quantization_config .*: 128"),
        ({"head_dim": 7}, r"rotary_dim = 7 must be even"),
        ({"rope_scaling": {"rope_type": "longrope", "long_factor": [1.0]}}, r"'longrope' lacks short_factor"),
        ({"rope_parameters": {"rope_type": "su"}}, r"'longrope' lacks long_factor, short_factor"),
        ({"rope_scaling": {"type": "linear"}}, r"'linear' lacks factor"),
        ({"rope_scaling": YARN | {"long_factor": [1.0]}}, r"'yarn' has unknown long_factor"),
        ({"rope_scaling": YARN | {"partial_rotary_factor": 0.5}}, r"partial_rotary_factor = 0\.5.*turns whole heads"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor = 0\.5.*turns whole heads"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantization_config \{'quant_method': 'gptq'"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"quantization_config .*weight_block_size"),
    ],
)
def test_a_config_that_would_be_read_wrongly_is_refused_by_name(folder, changes, says):
    edit_config(folder, **changes)
    with pytest.raises(PretrainedError, match=rf"(?s)config\.json.*{says}"):
        load_pretrained(folder)


def test_fields_that_change_nothing_are_passed_over(folder):
    extra = {"pretraining_tp": 1, "torch_dtype": "float32", "use_cache": True, "some_switch": False, "_name": "x"}
    notes = {"is_llama_config": True, "rope_interleaved": False, "unsloth_fixed": True, "max_sequence_length": 64}
    notes |= {"transformers.js_config": {"dtype": "q4"}, "pruned_heads": {}, "gradient_checkpointing": True}
    sampling = {"temperature": 0.6, "top_p": 0.9, "max_length": 64, "num_beams": 1, "repetition_penalty": 1.1}
    edit_config(folder, **extra, **notes, **sampling, eos_token_id=[1, 2])
    assert same_parameters(load_pretrained(folder), tiny_llama())


JUNK = (True, -1, 0, 1.5, "x", [1], [[1]], {"factor": "x"})
FEW = {"n_layer": 1, "num_hidden_layers": 1, "num_experts_per_tok": 2}


@pytest.mark.parametrize("name", PAIRS)
def test_whatever_a_field_holds_the_model_is_built_or_the_error_is_ours(name):
    """Every field of config.json in turn, at its published default otherwise; nothing is drawn on the meta device."""
    transformers = pytest.importorskip("transformers")
    Model, published = PAIRS[name]
    config = transformers.AutoConfig.for_model(published.model_type).to_dict()
    config |= {field: n for field, n in FEW.items() if field in config}
    config |= dict.fromkeys(("rope_scaling", "rope_theta", "layer_types", "mlp_layer_types"))
    if name == "glm4_moe":
        config["head_dim"] = 128  # half of the 42 channels that transformers would take is no number of pairs
    built, refused = set(), set()
    for field in config:
        for junk in (None, *JUNK):
            try:
                with torch.device("meta"):
                    Model(Model.Config(**read_config(published, config | {field: junk})))
                built.add(field)
            except ValueError:
                refused.add(field)
    assert "use_cache" in built - refused and "vocab_size" in refused


@pytest.mark.parametrize("rope_type", SCALINGS)
def test_whatever_a_setting_of_rope_is_the_error_is_ours(rope_type):
    good = {"rope_type": rope_type, **SCALINGS[rope_type]}
    normalise(good, 1e4, 64)
    for name in (*good, "rope_theta", "beta_fast", "truncate"):
        for junk in JUNK:
            with contextlib.suppress(ValueError):
                make_scaling(normalise(good | {name: junk}, 1e4, 64)["rope_scaling"])


WITH_ROPE = [name for name in PAIRS if hasattr(PAIRS[name][0].Config, "rope_theta")]


@pytest.mark.parametrize("name", [name for name in WITH_ROPE if name not in ("gemma3", "olmo3")])
def test_a_dict_for_each_type_of_layer_is_refused_where_there_is_one_rope(name):
    nested = {"full_attention": {"rope_type": "linear", "factor": 8.0}}
    _, published = PAIRS[name]
    with pytest.raises(ValueError, match="full_attention of RoPE"):
        read_config(published, {"num_experts_per_tok": 2, "rope_parameters": nested})


@pytest.mark.parametrize("name", PAIRS)
def test_fields_left_out_are_what_transformers_takes(name):
    Model, published = PAIRS[name]
    theirs = pytest.importorskip("transformers").AutoConfig.for_model(published.model_type).to_dict()
    needed = {"num_experts_per_tok": 6} if name == "deepseek_v2" else {}  # transformers cannot do without either
    ours = [Model.Config(**read_config(published, config | needed)) for config in ({}, theirs)]
    empty, whole = (spelled_out(config) for config in ours)
    assert empty == whole
    if needed:
        with pytest.raises(PretrainedError, match="num_experts_per_tok to null"):
            read_config(published, {})


def spelled_out(config):
    """With what stands for more: a width that follows from others, a pattern of layers."""
    more = {"head_dim": config.head_width} if hasattr(config, "head_width") else {}
    if hasattr(config, "layer_types"):
        more["layer_types"] = tuple(map(config.layer_type, range(config.n_layers)))
    return replace(config, **more)


# config.json as published, and the number of parameters that the model card has
COMMON = dict(attention_bias=False, attention_dropout=0.0, hidden_act="silu", initializer_range=0.02, use_cache=True)
COMMON |= dict(tie_word_embeddings=False, torch_dtype="bfloat16", rope_scaling=None, rope_theta=1000000.0)
WITHOUT_BIAS = {name: value for name, value in COMMON.items() if name != "attention_bias"}
CONFIGS = {
    "llama2-7b": (
        Llama,
        6_738_415_616,
        dict(
            **dict(architectures=["LlamaForCausalLM"], bos_token_id=1, eos_token_id=2, hidden_act="silu"),
            **dict(hidden_size=4096, initializer_range=0.02, intermediate_size=11008, max_position_embeddings=4096),
            **dict(model_type="llama", num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=32),
            **dict(pretraining_tp=1, rms_norm_eps=1e-05, rope_scaling=None, tie_word_embeddings=False),
            **dict(torch_dtype="float16", transformers_version="4.31.0.dev0", use_cache=True, vocab_size=32000),
        ),
    ),
    "llama3.1-8b": (
        Llama,
        8_030_261_248,
        COMMON
        | dict(
            **dict(architectures=["LlamaForCausalLM"], bos_token_id=128000, eos_token_id=[128001, 128008, 128009]),
            **dict(hidden_size=4096, intermediate_size=14336, max_position_embeddings=131072, mlp_bias=False),
            **dict(model_type="llama", num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=8),
            **dict(pretraining_tp=1, rms_norm_eps=1e-05, rope_theta=500000.0, vocab_size=128256),
            rope_scaling=dict(
                **dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192),
                rope_type="llama3",
            ),
        ),
    ),
    "mistral-7b-v0.1": (
        Mistral,
        7_241_732_096,
        dict(
            **dict(architectures=["MistralForCausalLM"], bos_token_id=1, eos_token_id=2, hidden_act="silu"),
            **dict(hidden_size=4096, initializer_range=0.02, intermediate_size=14336, max_position_embeddings=32768),
            **dict(model_type="mistral", num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=8),
            **dict(rms_norm_eps=1e-05, rope_theta=10000.0, sliding_window=4096, tie_word_embeddings=False),
            **dict(torch_dtype="bfloat16", transformers_version="4.34.0.dev0", use_cache=True, vocab_size=32000),
        ),
    ),
    "qwen2-7b": (
        Qwen2,
        7_615_616_512,
        WITHOUT_BIAS
        | dict(
            **dict(architectures=["Qwen2ForCausalLM"], bos_token_id=151643, eos_token_id=151643, hidden_size=3584),
            **dict(intermediate_size=18944, max_position_embeddings=131072, max_window_layers=28, model_type="qwen2"),
            **dict(num_attention_heads=28, num_hidden_layers=28, num_key_value_heads=4, rms_norm_eps=1e-06),
            **dict(sliding_window=131072, use_sliding_window=False, vocab_size=152064),
        ),
    ),
    "qwen3-8b": (
        Qwen3,
        8_190_735_360,
        COMMON
        | dict(
            **dict(architectures=["Qwen3ForCausalLM"], bos_token_id=151643, eos_token_id=151645, head_dim=128),
            **dict(hidden_size=4096, intermediate_size=12288, max_position_embeddings=40960, max_window_layers=36),
            **dict(model_type="qwen3", num_attention_heads=32, num_hidden_layers=36, num_key_value_heads=8),
            **dict(rms_norm_eps=1e-06, sliding_window=None, use_sliding_window=False, vocab_size=151936),
        ),
    ),
    "mixtral-8x7b": (
        Mixtral,
        46_702_792_704,
        WITHOUT_BIAS
        | dict(
            **dict(architectures=["MixtralForCausalLM"], bos_token_id=1, eos_token_id=2, hidden_size=4096),
            **dict(intermediate_size=14336, max_position_embeddings=32768, model_type="mixtral"),
            **dict(num_attention_heads=32, num_experts_per_tok=2, num_hidden_layers=32, num_key_value_heads=8),
            **dict(num_local_experts=8, output_router_logits=False, rms_norm_eps=1e-05, router_aux_loss_coef=0.02),
            **dict(sliding_window=None, vocab_size=32000),
        ),
    ),
    "deepseek-v2-lite": (
        DeepseekV2,
        15_706_484_224,
        COMMON
        | dict(
            **dict(architectures=["DeepseekV2ForCausalLM"], aux_loss_alpha=0.001, bos_token_id=100000),
            **dict(auto_map={"AutoConfig": "configuration_deepseek.DeepseekV2Config"}, eos_token_id=100001),
            **dict(first_k_dense_replace=1, hidden_size=2048, intermediate_size=10944, kv_lora_rank=512),
            **dict(max_position_embeddings=163840, model_type="deepseek_v2", moe_intermediate_size=1408, n_group=1),
            **dict(moe_layer_freq=1, n_routed_experts=64, n_shared_experts=2, norm_topk_prob=False, topk_group=1),
            **dict(num_attention_heads=16, num_experts_per_tok=6, num_hidden_layers=27, num_key_value_heads=16),
            **dict(pretraining_tp=1, q_lora_rank=None, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128),
            **dict(rms_norm_eps=1e-06, rope_theta=10000, routed_scaling_factor=1.0, scoring_func="softmax"),
            **dict(seq_aux=True, topk_method="greedy", vocab_size=102400),
            rope_scaling=dict(
                **dict(beta_fast=32, beta_slow=1, factor=40, mscale=0.707, mscale_all_dim=0.707, type="yarn"),
                original_max_position_embeddings=4096,
            ),
        ),
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_published_config_is_the_model_of_its_size(name):
    Model, n_parameters, published = CONFIGS[name]
    assert find_model(Path(name), published) is Model
    config = Model.Config(**read_config(PUBLISHED[Model], published))
    assert spelled_out(config) == spelled_out(SIZES[Model][name])
    with torch.device("meta"):
        model = Model(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == n_parameters


# --- the table of names


@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 2))
def test_every_operation_undoes_itself(size, n, dim):
    x = torch.randn(n * size * 2, n * size * 4, n * size * 6)
    pieces = [piece.clone() for piece in x.chunk(n, dim)]
    cases = [(same, [x]), (transpose, [x]), (split(n, dim), [x]), (join(n, dim), pieces), (deinterleave(dim - 3), [x])]
    for operation, theirs in [*cases, (transpose.then(split(n, dim)), [x])]:
        back = operation.save(operation.load(theirs))
        assert len(back) == len(theirs) and all(map(torch.equal, back, theirs))


def test_operations_do_what_they_are_called():
    x = torch.arange(6.0).reshape(1, 6)
    assert [part.tolist() for part in split(3, 1).load([x])] == [[[0, 1]], [[2, 3]], [[4, 5]]]
    assert join(2, 0).load([x, -x])[0].tolist() == [x[0].tolist(), (-x)[0].tolist()]
    assert deinterleave(-1).load([x])[0].tolist() == [[0, 2, 4, 1, 3, 5]]
    assert transpose.load([x])[0].shape == (6, 1)
    assert transpose.then(split(3)).load([x])[1].tolist() == [[2], [3]]


ROWS = (
    ("blocks.{layer}.gate_up[{expert}]", ("l.{layer}.e.{expert}.gate", "l.{layer}.e.{expert}.up"), join(2)),
    ("blocks.{layer}.gate_up", "l.{layer}.fused", same),
    (("blocks.{layer}.q", "blocks.{layer}.k"), "l.{layer}.qk", split(2)),
    ("blocks.{layer}.*", "l.{layer}.*", same),
)


def test_rows_find_their_tensors_and_experts():
    tensors = {"blocks.7.gate_up": torch.zeros(2, 4, 3), "blocks.7.k": torch.zeros(2), "blocks.7.q": torch.zeros(2)}
    steps = plan(ROWS, tensors | {"blocks.7.o.bias": torch.zeros(1)})
    assert [(step.ours, step.theirs) for step in steps] == [
        ([("blocks.7.gate_up", 0)], ["l.7.e.0.gate", "l.7.e.0.up"]),
        ([("blocks.7.gate_up", 1)], ["l.7.e.1.gate", "l.7.e.1.up"]),
        ([("blocks.7.q", None), ("blocks.7.k", None)], ["l.7.qk"]),
        ([("blocks.7.o.bias", None)], ["l.7.o.bias"]),
    ]
    with pytest.raises(PretrainedError, match="no row of the name table has a place for norm"):
        plan(ROWS, {"norm": torch.zeros(1)})


def test_the_layout_that_the_checkpoint_has_is_taken():
    tensors = {"blocks.0.gate_up": torch.zeros(2, 4, 3)}
    assert [step.theirs for step in plan(ROWS, tensors, {"l.0.fused"})] == [["l.0.fused"]]
    assert len(plan(ROWS, tensors, {"l.0.e.1.up"})) == 2  # the rest of it is then missing by name


def test_dynamic_scaling_knows_its_trained_length_and_nothing_else_guesses():
    read = normalise({"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 5}, 1e4, 100)
    scaling = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 100}
    assert read == {"rope_theta": 1e4, "rope_scaling": scaling, "max_seq_len": 200}
    assert normalise({}, 5e5, 100) == {"rope_theta": 5e5, "rope_scaling": {}}


# --- weights in 4 and 8 bits


def mxfp4(n_experts=3, n_out=6, n_blocks=2):
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (n_experts, n_out, n_blocks, 16), generator=generator).to(torch.uint8)
    scales = torch.randint(120, 134, (n_experts, n_out, n_blocks), generator=generator).to(torch.uint8)
    return blocks, scales


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_mxfp4_equals_transformers_and_a_loop(dtype):
    blocks, scales = mxfp4()
    ours = dequantize_mxfp4(blocks, scales, dtype)
    convert = pytest.importorskip("transformers.integrations.mxfp4").convert_moe_packed_tensors
    assert torch.equal(ours, convert(blocks, scales, dtype=dtype))
    for e, o, i in [(0, 0, 0), (0, 0, 1), (2, 5, 63), (1, 3, 32), (1, 2, 31)]:
        byte = int(blocks[e, o, i // 32, i % 32 // 2])
        value = FP4_VALUES[byte >> 4 if i % 2 else byte & 15] * 2.0 ** (int(scales[e, o, i // 32]) - 127)
        assert ours[e, i, o].item() == value


def test_fp8_equals_transformers_and_a_loop_also_where_blocks_are_cut_off():
    weight = (100 * torch.randn(256, 384, generator=torch.Generator().manual_seed(0))).to(torch.float8_e4m3fn)
    scales = torch.rand(2, 3) + 0.5
    module = pytest.importorskip("transformers.integrations.finegrained_fp8")
    theirs = module.Fp8Dequantize(SimpleNamespace())._dequantize_one(weight, scales, torch.float32)
    assert torch.equal(dequantize_fp8(weight, scales, torch.float32), theirs)
    cut = dequantize_fp8(weight[:130, :200].contiguous(), scales[:2, :2], torch.float32)
    expected = [[float(weight[i, j].float() * scales[i // 128, j // 128]) for j in range(200)] for i in range(130)]
    assert torch.equal(cut, torch.tensor(expected))
    with pytest.raises(ValueError, match=r"scales \(2, 3\) do not fit \(130, 200\)"):
        dequantize_fp8(weight[:130, :200], scales, torch.float32)


def store_in_fp8(folder) -> dict[str, torch.Tensor]:
    """Matrices in float8 with a scale for 16 x 16 weights; returns what these numbers mean."""
    meant = {}

    def quantize(weights):
        for name in [name for name in weights if "proj" in name]:
            rows, columns = weights[name].shape
            scale = torch.rand(-(-rows // 16), -(-columns // 16)) + 0.5
            whole = scale.repeat_interleave(16, 0)[:rows].repeat_interleave(16, 1)[:, :columns]
            weights[name] = (weights[name] / whole).to(torch.float8_e4m3fn)
            weights[name + "_scale_inv"] = scale
            meant[name] = weights[name].float() * whole

    edit_weights(folder, quantize)
    edit_config(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [16, 16]})
    return meant


def test_a_checkpoint_in_fp8_is_expanded_while_it_is_read(folder):
    meant = store_in_fp8(folder)
    model = load_pretrained(folder)
    assert len(meant) == 14 and model.norm.weight.dtype == torch.float32
    for name in ("q_proj", "o_proj"):
        expected = meant[f"model.layers.1.self_attn.{name}.weight"]
        assert torch.equal(getattr(model.blocks[1].mixer, name).weight.detach(), expected)


Q, NORM, EXPERTS = "model.layers.1.self_attn.q_proj.weight", "model.norm.weight", "model.layers.1.mlp.experts.down_proj"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {Q + "_scale_inv": None},
            rf"{Q} \(F8_E4M3 \(32, 32\) in .*tensors\) is not read without {Q}_scale_inv",
        ),
        ({Q: None}, rf"{Q}_scale_inv \(F32 \(2, 2\) in .*model.safetensors\) has no {Q}"),
        ({Q + "_scale_inv": torch.ones(2, 3)}, rf"{Q} .*{Q}_scale_inv \(F32 \(2, 3\) .*blocks of \(16, 16\)"),
        ({Q + "_scale_inv": torch.ones(2, 2, dtype=torch.uint8)}, rf"{Q}_scale_inv \(U8 .* are not FP8"),
        ({Q: torch.ones(32, 32)}, rf"{Q} \(F32 .* are not FP8"),
        ({NORM: torch.ones(32, dtype=torch.int64)}, rf"{NORM} \(I64 \(32,\) in .*model.safetensors\) is not read"),
        ({NORM: torch.ones(32).to(torch.float8_e5m2)}, rf"{NORM} \(F8_E5M2 .* is not read without {NORM}_scale_inv"),
        ({EXPERTS + "_blocks": mxfp4()[0]}, rf"{EXPERTS}_blocks \(U8 \(3, 6, 2, 16\).* has no {EXPERTS}_scales"),
        ({EXPERTS + "_scales": mxfp4()[1]}, rf"{EXPERTS}_scales \(U8 \(3, 6, 2\).* has no {EXPERTS}_blocks"),
        (
            {EXPERTS + "_blocks": mxfp4()[0][0], EXPERTS + "_scales": mxfp4()[1]},
            rf"{EXPERTS}_blocks \(U8 \(6, 2, 16\).* are not MXFP4",
        ),
        (
            {EXPERTS + "_blocks": mxfp4()[0], EXPERTS + "_scales": mxfp4()[1][:, :1].contiguous()},
            rf"{EXPERTS}_scales \(U8 \(3, 1, 2\).* are not MXFP4",
        ),
        ({EXPERTS + "_blocks": mxfp4()[0], EXPERTS + "_scales": mxfp4()[1].float()}, r"_scales \(F32 .*are not MXFP4"),
    ],
)
def test_parts_of_quantised_tensors_that_do_not_fit_are_named_before_any_is_read(folder, monkeypatch, changes, says):
    store_in_fp8(folder)

    def change(weights):
        weights.update({name: tensor for name, tensor in changes.items() if tensor is not None})
        for name in [name for name, tensor in changes.items() if tensor is None]:
            del weights[name]

    edit_weights(folder, change)
    monkeypatch.setattr(HubTensors, "stored", lambda self, name: pytest.fail(f"{name} was read"))
    with pytest.raises(PretrainedError, match=says):
        load_pretrained(folder)


# --- export


def test_a_model_that_transformers_has_not_is_refused_with_those_it_has(tmp_path):
    with pytest.raises(PretrainedError, match=r"can hold a Baseline; the models that can be exported are .*llama"):
        export_pretrained(tiny_model("baseline"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_export_overwrites_nothing_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(PretrainedError, match="exists and is not an empty folder"):
        export_pretrained(tiny_llama(), out)
    (out / "notes.txt").unlink()

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("llm.hub.export.save_file", full)
        with pytest.raises(PretrainedError, match=r"cannot write .*No space left"):
            export_pretrained(tiny_llama(), out)
    assert list(tmp_path.iterdir()) == [out] and not list(out.iterdir())
    export_pretrained(tiny_llama(), out)
    assert same_parameters(load_pretrained(out), tiny_llama())


def test_several_exports_to_one_folder_give_one_whole_model_and_named_refusals(tmp_path):
    """The fixed name of the folder that was written let each remove the files of the others."""
    out = tmp_path / "out"
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp" / "notes.txt").write_text("mine", encoding="utf-8")
    models, start = [tiny_llama() for _ in range(6)], threading.Barrier(6)

    def export(model):
        start.wait()
        try:
            return export_pretrained(model, out)
        except PretrainedError as error:
            return str(error)

    with ThreadPoolExecutor(6) as pool:
        ends = list(pool.map(export, models))
    assert ends.count(out) == 1
    assert all("cannot write" in end or "is not an empty folder" in end for end in ends if end != out)
    assert same_parameters(load_pretrained(out), tiny_llama())
    assert sorted(os.listdir(tmp_path)) == ["out", "out.tmp"] and os.listdir(tmp_path / "out.tmp") == ["notes.txt"]


WITH_HEADS = [name for name in PAIRS if "n_heads" in PAIRS[name][0].Config.__dataclass_fields__]


@pytest.mark.parametrize(
    "name", [name for name in WITH_HEADS if name not in ("gpt2", "recurrent_gemma")]
)  # which divide
def test_where_transformers_opens_no_such_shape_it_is_not_exported(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    Model, published = PAIRS[name]
    heads = {} if name.startswith(("deepseek", "kimi")) else {"n_kv_heads": 1, "head_dim": 8}
    heads |= {"partial_rotary_factor": 1.0} if name == "minimax" else {}  # transformers turns whole heads there
    heads |= {"n_mamba_heads": 2, "mamba_head_dim": 36} if name == "granitemoehybrid" else {}
    shape = {"d_model": 36, "n_heads": 5, "n_layers": 2, "vocab_size": 97, "max_seq_len": 64}
    model = Model(Model.Config(**Model.Config.small | shape | heads)).eval()
    if published.heads_divide_width:
        with pytest.raises(Exception, match=r"\(36\) is not a multiple"):
            transformers.AutoConfig.for_model(
                published.model_type, hidden_size=36, num_attention_heads=5, num_key_value_heads=1, head_dim=8
            )
        with pytest.raises(PretrainedError, match=r"heads = 5.*--model\.n-heads.*can be trained and kept"):
            export_pretrained(model, tmp_path / "out")
        assert not list(tmp_path.iterdir())
    else:
        out = export_pretrained(model, tmp_path / "out")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(out, **EAGER).eval()
        assert_same_logits(theirs, model)


def test_a_whole_number_for_a_float_is_exported_as_transformers_wants_it(tmp_path):
    transformers = pytest.importorskip("transformers")
    shape = {"vocab_size": 97, "n_layers": 1, "soft_cap": 50, "logit_soft_cap": 30}
    out = export_pretrained(Gemma2(Gemma2.Config(**Gemma2.Config.small | shape)), tmp_path / "out")
    assert transformers.AutoConfig.from_pretrained(out).attn_logit_softcapping == 50.0


# --- text


def byte_tokenizer(*special: str, first: str | None = None) -> Tokenizer:
    """256 bytes and special tokens, none of them `<|endoftext|>`; `first` comes before each text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    if first is not None:
        tokenizer.post_processor = processors.TemplateProcessing(f"{first} $A", special_tokens=[(first, 256)])
    return tokenizer


SPECIAL = ("<s>", "</s>", "<|im_end|>")
PROMPT = "Once<|im_end|>upon"


def write_json(file, content) -> None:
    file.write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture
def hub(tmp_path):
    """A published folder with a tokenizer of its own, and an end of text that this model soon comes to."""
    folder = export_pretrained(tiny_llama(vocab_size=259), tmp_path / "published")
    byte_tokenizer(*SPECIAL, first="<s>").save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"} | names)
    model, prompt = load_pretrained(folder), load_hub_tokenizer(folder).encode(PROMPT).ids
    text = [int(token) for token in model.generate(torch.tensor([prompt]), 12, lambda scores: scores.argmax(-1))]
    ends = [257, text[8]]
    edit_config(folder, bos_token_id=256, eos_token_id=ends, pad_token_id=257)
    write_json(folder / "generation_config.json", {"bos_token_id": 256, "eos_token_id": ends})
    return folder


@pytest.mark.parametrize("says", ["both", "config.json", "generation_config.json"])
@pytest.mark.parametrize("shell", [True, False])
def test_an_export_of_a_published_model_ends_its_texts_where_that_did(hub, tmp_path, says, shell):
    transformers = pytest.importorskip("transformers")
    ends = stop_tokens(hub)
    if says == "config.json":
        (hub / "generation_config.json").unlink()
    elif says == "generation_config.json":
        edit_config(hub, eos_token_id=None)
    if shell:
        pretrained(["export", str(hub), str(tmp_path / "out")])
    else:
        export_pretrained(load_pretrained(hub), tmp_path / "out", tokenizer=hub / "tokenizer.json")
    out, tokenizers = tmp_path / "out", transformers.AutoTokenizer
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    prompt = tokenizers.from_pretrained(out)(PROMPT, return_tensors="pt")
    text = theirs.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1] :].tolist()
    assert text[-1] in ends and not set(text[:-1]) & set(ends) and len(text) <= 9
    assert tokenizers.from_pretrained(out).special_tokens_map == tokenizers.from_pretrained(hub).special_tokens_map
    assert theirs.config.bos_token_id == 256 and theirs.config.pad_token_id == 257
    assert stop_tokens(out) == ends
    model, tokenizer = load_run(out, torch.device("cpu"))
    assert write(model, tokenizer, [PROMPT], 20, stop=stop_tokens(out)) == [PROMPT + tokenizer.decode(text[:-1])]


@pytest.mark.parametrize("published", [True, False])
def test_an_exported_tokenizer_pads_a_batch_on_the_left_so_that_it_continues_as_each_text_alone(
    hub, tmp_path, published
):
    transformers = pytest.importorskip("transformers")
    ours = byte_tokenizer("<|endoftext|>")
    export_pretrained(load_pretrained(hub), tmp_path / "out", hub / "tokenizer.json" if published else ours)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", **EAGER).eval()
    texts, greedy = ["Once", "Once upon a time"], {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    batch = model.generate(**tokenizer(texts, padding=True, return_tensors="pt"), **greedy)
    for row, text in enumerate(texts):
        alone = model.generate(**tokenizer(text, return_tensors="pt"), **greedy)
        assert batch[row, -6:].equal(alone[0, -6:])


def test_a_side_for_padding_that_the_publisher_chose_stays(hub, tmp_path):
    settings = json.loads((hub / "tokenizer_config.json").read_text(encoding="utf-8")) | {"padding_side": "right"}
    write_json(hub / "tokenizer_config.json", settings)
    out = export_pretrained(load_pretrained(hub), tmp_path / "out", tokenizer=hub / "tokenizer.json")
    assert json.loads((out / "tokenizer_config.json").read_text(encoding="utf-8")) == settings


def test_the_tokens_that_end_a_text_stand_in_generation_config_or_in_config(hub):
    ends = json.loads((hub / "config.json").read_text(encoding="utf-8"))["eos_token_id"]
    write_json(hub / "generation_config.json", {"eos_token_id": 258})
    assert stop_tokens(hub) == (258,)
    write_json(hub / "generation_config.json", {"temperature": 0.6})
    assert stop_tokens(hub) == tuple(ends)
    (hub / "generation_config.json").unlink()
    assert stop_tokens(hub) == tuple(ends)
    edit_config(hub, eos_token_id=None)
    assert stop_tokens(hub) == ()


NAMES = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
BOS = NAMES | {"bos_token": {"content": "<s>", "lstrip": False, "__type": "AddedToken"}, "add_bos_token": True}


@pytest.mark.parametrize(
    ("first", "settings", "begins"),
    [
        ("<s>", NAMES, [256]),
        ("<s>", NAMES | {"add_bos_token": True}, [256]),
        ("<s>", NAMES | {"add_bos_token": False}, [256]),
        ("<s>", None, [256]),
        (None, NAMES, []),
        (None, NAMES | {"add_bos_token": False}, []),
        (None, None, []),
    ],
)
def test_a_published_tokenizer_begins_a_text_as_in_transformers(hub, first, settings, begins):
    transformers = pytest.importorskip("transformers")
    byte_tokenizer(*SPECIAL, first=first).save(str(hub / "tokenizer.json"))
    (hub / "tokenizer_config.json").unlink()
    if settings is not None:
        write_json(hub / "tokenizer_config.json", settings)
    theirs = transformers.AutoTokenizer.from_pretrained(hub)(PROMPT)["input_ids"]
    assert encode_prompt(load_hub_tokenizer(hub), PROMPT) == theirs
    assert len(theirs) == len(begins) + len("Once") + 1 + len("upon") and theirs[: len(begins)] == begins


@pytest.mark.parametrize("settings", [BOS, BOS | {"bos_token": "<s>"}, BOS | {"tokenizer_class": "LlamaTokenizerFast"}])
@pytest.mark.parametrize("offsets", [True, False])
def test_a_text_begins_with_bos_where_only_the_settings_say_so_as_deepseeks_do(hub, settings, offsets):
    """transformers 5 does it when told again, transformers 4 did it by itself."""
    transformers = pytest.importorskip("transformers")
    tokenizer = byte_tokenizer(*SPECIAL)
    if offsets:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.save(str(hub / "tokenizer.json"))
    write_json(hub / "tokenizer_config.json", settings)
    told = transformers.AutoTokenizer.from_pretrained(hub, add_bos_token=True)(PROMPT)["input_ids"]
    assert encode_prompt(load_hub_tokenizer(hub), PROMPT) == told and told[0] == 256
    assert transformers.AutoTokenizer.from_pretrained(hub)(PROMPT)["input_ids"] == told[1:]


def test_a_published_tokenizer_that_cannot_be_read_is_named_with_its_folder(hub):
    write_json(hub / "tokenizer_config.json", BOS | {"bos_token": "<bos>"})
    with pytest.raises(PretrainedError, match=r"published/tokenizer\.json has no '<bos>'"):
        load_hub_tokenizer(hub)
    (hub / "tokenizer.json").write_text("{}", encoding="utf-8")
    for use in (load_hub_tokenizer, partial(load_run, device=torch.device("cpu"))):
        with pytest.raises(PretrainedError, match=r"published/tokenizer\.json is not a tokenizer.*download it again"):
            use(hub)
    with pytest.raises(PretrainedError, match=r"tokenizer\.json is not a tokenizer"):
        export_pretrained(tiny_llama(), hub / "out", tokenizer=hub / "tokenizer.json")
    (hub / "tokenizer.json").unlink()
    with pytest.raises(PretrainedError, match=r"published/tokenizer\.json is missing"):
        load_run(hub, torch.device("cpu"))


def test_a_prompt_is_neither_padded_nor_cut_whatever_a_tokenizer_was_saved_with(hub):
    transformers = pytest.importorskip("transformers")
    tokenizer = byte_tokenizer(*SPECIAL)
    tokenizer.enable_padding(length=30, pad_token="</s>", pad_id=257)
    tokenizer.enable_truncation(4)
    tokenizer.save(str(hub / "tokenizer.json"))
    ids = encode_prompt(load_hub_tokenizer(hub), PROMPT)
    assert len(ids) == 9 and ids == transformers.AutoTokenizer.from_pretrained(hub)(PROMPT)["input_ids"]


def test_our_own_tokenizers_take_special_tokens_in_a_text_for_plain_text():
    tokenizer = train_bpe(["a b c"], 257)
    assert encode_prompt(tokenizer, "<|endoftext|>") == [0, *tokenizer.encode("<|endoftext|>").ids]
    assert 0 not in tokenizer.encode("<|endoftext|>").ids


def test_a_tokenizer_without_an_end_of_text_writes_as_far_as_it_may():
    tokenizer, model = byte_tokenizer("<s>"), tiny_llama(vocab_size=257)
    assert encode_prompt(tokenizer, "Once") == tokenizer.encode("Once").ids
    (text,) = write(model, tokenizer, ["Once"], 5)
    assert text.startswith("Once")


def test_a_trained_run_writes_the_same_text_in_transformers(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "data").mkdir()
    data = write_corpus(tmp_path / "data")
    flags = {"tokens_per_step": 512, "micro_batch_size": 8, "warmup_steps": 2, "eval_windows": 2, "eval_every": 20}
    config = TrainConfig(data=data, out=tmp_path / "run", steps=20, max_lr=1e-2, device="cpu", wandb="off", **flags)
    tokens = open_tokens(data)
    run = train(Llama, Llama.Config(**SMALL | {"vocab_size": tokens.vocab_size}), config, tokens)
    pretrained(["export", str(run), str(tmp_path / "out")])
    model, tokenizer = load_run(run, torch.device("cpu"))
    (expected,) = write(model, tokenizer, ["Once upon a"], 40)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = their_tokenizer("Once upon a", return_tensors="pt")
    assert prompt["input_ids"][0].tolist() == encode_prompt(tokenizer, "Once upon a")
    generated = theirs.generate(**prompt, max_new_tokens=40, do_sample=False)
    assert their_tokenizer.decode(generated[0], skip_special_tokens=True) == expected
    capsys.readouterr()
    generate([str(tmp_path / "out"), "--prompt", "Once upon a", "--temperature", "0", "--max-new-tokens", "40"])
    assert capsys.readouterr().out == expected + "\n"
