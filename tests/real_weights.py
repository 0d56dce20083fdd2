"""Small models that others trained, with the answers that others published: where they are, and converters.

The files are not part of this repository. They are looked for in the folder that the environment variable
LLM_REAL_WEIGHTS names, or in `shared/weights` beside the repository or beside a folder above it. A test that needs a
file which is not there is skipped, and says so.

    stories260K.bin, tok512.bin    Llama of 260,032 parameters, trained on TinyStories, from llama2.c (MIT)
    gpt-nano-sort-*.json           minGPT of 85,728 parameters that sorts six letters, from llm-viz (MIT)
    TinyStoriesV2-GPT4-valid.txt   a part of the validation text
"""

import base64
import hashlib
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from torch import Tensor
from training import ROOT

SHA256 = {
    "stories260K.bin": "b0a507e7ad0f626624f17112325e66691f9076d622e1d3274d103d00299f2696",
    "tok512.bin": "037cb335abb25d1fa9e8ecae30ed2a3a8ace9302862ebcdc05d51a6bbb10c312",
    "gpt-nano-sort-model.json": "a38d5f450e0c808305973c587cdd389ca4de92bbf60fa6a4482bf9a03f0a6051",
    "gpt-nano-sort-t0-partials.json": "642b29b966fc4d90e4672a54c7cfda72b5249427b2b1561c83cd536b857195e9",
    "TinyStoriesV2-GPT4-valid.txt": "b1a45c1b4356f437ffcd92269dd8e5a1bf2d84c81bd60b07baef8bcebab29f88",
}


def real_file(name: str) -> Path:
    """The path of a file, whose SHA-256 is checked; the test is skipped where it is missing."""
    places = [Path(os.environ["LLM_REAL_WEIGHTS"])] if "LLM_REAL_WEIGHTS" in os.environ else []
    places += [parent / "shared" / folder for parent in ROOT.resolve().parents for folder in ("weights", "data")]
    found = next((place / name for place in places if (place / name).is_file()), None)
    if found is None:
        pytest.skip(f"{name} is not here: set LLM_REAL_WEIGHTS to the folder that holds it")
    assert hashlib.sha256(found.read_bytes()).hexdigest() == SHA256[name], f"{found} is another file"
    return found


def write_stories260k(folder: Path) -> Path:
    """llama2.c's stories260K as a hub folder.

    The file holds seven sizes and then float32, each kind of matrix stacked over the layers. Its RoPE turns channels 2i
    and 2i + 1 of a head, ours turns i and i + d / 2, so the rows of queries and keys are reordered.
    """
    raw = real_file("stories260K.bin").read_bytes()
    d, d_ff, n_layers, n_heads, n_kv_heads, n_vocab, length = struct.unpack_from("7i", raw)
    numbers, at = torch.from_numpy(np.frombuffer(raw, "<f4", offset=28).copy()), 0

    def take(*shape: int) -> Tensor:
        nonlocal at
        at += int(np.prod(shape))
        return numbers[at - int(np.prod(shape)) : at].view(shape)

    def half_split(rows: Tensor, heads: int) -> Tensor:
        return rows.unflatten(-2, (heads, -1, 2)).transpose(-3, -2).flatten(-4, -2)

    kv = d // n_heads * n_kv_heads
    tensors = {"model.embed_tokens.weight": take(n_vocab, d)}
    stacked = {
        "input_layernorm": take(n_layers, d),
        "self_attn.q_proj": half_split(take(n_layers, d, d), n_heads),
        "self_attn.k_proj": half_split(take(n_layers, kv, d), n_kv_heads),
        "self_attn.v_proj": take(n_layers, kv, d),
        "self_attn.o_proj": take(n_layers, d, d),
        "post_attention_layernorm": take(n_layers, d),
        "mlp.gate_proj": take(n_layers, d_ff, d),
        "mlp.down_proj": take(n_layers, d, d_ff),
        "mlp.up_proj": take(n_layers, d_ff, d),
    }
    tensors |= {f"model.layers.{i}.{name}.weight": x[i] for name, x in stacked.items() for i in range(n_layers)}
    tensors["model.norm.weight"] = take(d)
    config = dict(
        **dict(model_type="llama", vocab_size=n_vocab, hidden_size=d, intermediate_size=d_ff, rms_norm_eps=1e-5),
        **dict(num_hidden_layers=n_layers, num_attention_heads=n_heads, num_key_value_heads=n_kv_heads),
        **dict(max_position_embeddings=length, rope_theta=10_000.0, tie_word_embeddings=True),
        **dict(bos_token_id=1, eos_token_id=2),
    )
    write_folder(folder, config, tensors)
    sentencepiece_bpe(real_file("tok512.bin").read_bytes()).save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def sentencepiece_bpe(raw: bytes) -> Tokenizer:
    """llama2.c's tokenizer file: the longest token, then score, length and bytes of each token.

    sentencepiece merges the pair whose token has the best score; `tokenizers` wants these pairs in order.
    """
    pieces, at = [], 4
    while at < len(raw):
        _, length = struct.unpack_from("fi", raw, at)
        pieces.append(raw[at + 8 : at + 8 + length].decode())
        at += 8 + length
    pieces[1:3] = ["<s>", "</s>"]
    pieces[3:] = [piece.replace(" ", "\N{LOWER ONE EIGHTH BLOCK}") for piece in pieces[3:]]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    merges = [  # the tokens after the bytes stand in the order of their scores
        (piece[:cut], piece[cut:])
        for piece in pieces[259:]
        for cut in sorted(range(1, len(piece)), key=lambda cut: vocabulary.get(piece[:cut], 0))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    space = "\N{LOWER ONE EIGHTH BLOCK}"
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(space), normalizers.Replace(" ", space)])
    steps = [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in ("<unk>", "<s>", "</s>")])
    return tokenizer


def write_gpt_nano(folder: Path) -> Path:
    """minGPT's model that sorts as a hub folder: GPT-2 with matrices stored (in, out), where torch has (out, in)."""
    file = json.loads(real_file("gpt-nano-sort-model.json").read_text(encoding="utf-8"))
    sizes = file["config"]
    tensors = {
        name: tensor_of(entry) for name, entry in file.items() if "." in name and not name.endswith(".attn.bias")
    }
    tensors = {name: x.mT if ".h." in name and x.dim() == 2 else x for name, x in tensors.items()}
    config = dict(
        **dict(model_type="gpt2", vocab_size=sizes["vocab_size"], n_positions=sizes["block_size"]),
        **dict(n_embd=sizes["n_embd"], n_layer=sizes["n_layer"], n_head=sizes["n_head"]),
        **dict(activation_function="gelu_new", layer_norm_epsilon=1e-5, tie_word_embeddings=False),
    )
    write_folder(folder, config, tensors)
    return folder


def published_partials() -> dict[str, Tensor]:
    """Every intermediate tensor that llm-viz publishes for one batch of the model that sorts."""
    file = json.loads(real_file("gpt-nano-sort-t0-partials.json").read_text(encoding="utf-8"))
    return {name: tensor_of(entry) for name, entry in file.items() if name != "config"}


def tensor_of(entry: dict) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(entry["data"]), "<f4").copy()).view(entry["shape"])


def write_folder(folder: Path, config: dict, tensors: dict[str, Tensor]) -> None:
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file({name: x.contiguous() for name, x in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
