"""GGUF files: one file with the weights, mostly quantised, the sizes and the tokenizer, as llama.cpp has them.

    model = load_pretrained("model.gguf")

The package `gguf` (an extra: `uv sync --extra gguf`) reads the file and dequantises one tensor at a time. This module
gives tensors and sizes the names that the same model has on the hub, so that llm/hub/maps/ reads both. llama.cpp turns
neighbouring channels in files of `llama`, so the rows of queries and keys are reordered; it adds 1 to Gemma's gains.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm.hub.folder import check_not_a_pointer
from llm.hub.tables import PretrainedError

MODEL_TYPES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2", "gemma3": "gemma3_text"}
SIZES = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "embedding_length": "hidden_size",
    "rope.freq_base": "rope_theta",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
NAMES = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "attn_output": "self_attn.o_proj",
    **{f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"},
    **{f"attn_{x}_norm": f"self_attn.{x}_norm" for x in "qk"},
    **{f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
}
ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


class GGUFFile:
    """A GGUF file, which has the tensors of a hub folder under their published names, read one at a time.

    `config` are the fields of its config.json. Raises PretrainedError where the package `gguf` is missing, for a part
    of a file or a note of Git LFS, and for an architecture, a scaling of RoPE or a tensor that is not known here.
    """

    def __init__(self, path: Path):
        try:
            from gguf import GGUFReader
        except ImportError:
            raise PretrainedError(
                f"{path} is read by the package gguf: uv sync --extra gguf, or pip install gguf"
            ) from None
        check_not_a_pointer(path)
        try:
            reader = GGUFReader(path)
        except (OSError, ValueError, IndexError) as error:
            raise PretrainedError(f"{path} cannot be read: {error}; download it again") from None
        self.path, self.fields = path, reader.fields
        if (n_parts := max(part_of(path.name)[1], self.get("split.count", 1))) > 1:
            raise PretrainedError(
                f"{path} is one of {n_parts} parts of a file, and whole files are read: join them with llama.cpp's "
                "llama-gguf-split --merge FIRST_PART WHOLE.gguf, and name the whole file"
            )
        self.architecture = str(self.get("general.architecture"))
        if self.architecture not in MODEL_TYPES:
            known = ", ".join(MODEL_TYPES)
            raise PretrainedError(f"{path} holds a {self.architecture!r}; of GGUF files, {known} are read")
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.frequencies = tensors.pop("rope_freqs.weight", None)
        self.tensors = {self.published_name(name): tensor for name, tensor in tensors.items()}
        self.shapes = {name: tuple(map(int, reversed(x.shape))) for name, x in self.tensors.items()}
        self.config = self.read_config()

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a field of the file's metadata."""
        return self.fields[name].contents() if name in self.fields else default

    def published_name(self, name: str) -> str:
        """The name of a tensor on the hub."""
        stem, kind = name.rsplit(".", 1)
        if stem in ENDS:
            return f"{ENDS[stem]}.{kind}"
        block, layer, part = stem.split(".", 2) if stem.count(".") == 2 else ("", "", stem)
        feed_forward = "pre_feedforward" if self.architecture.startswith("gemma") else "post_attention"
        known = NAMES | {"ffn_norm": f"{feed_forward}_layernorm"}
        if block != "blk" or part not in known:
            raise PretrainedError(f"{self.path} holds {name}, which a {self.architecture} here does not have")
        return f"model.layers.{layer}.{known[part]}.{kind}"

    def read_config(self) -> dict[str, Any]:
        """The fields of config.json that the metadata say."""
        found = {theirs: self.get(f"{self.architecture}.{ours}") for ours, theirs in SIZES.items()}
        config = {name: value for name, value in found.items() if value is not None}
        width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        config |= {"model_type": MODEL_TYPES[self.architecture], "head_dim": width}
        config["vocab_size"] = self.shapes["model.embed_tokens.weight"][0]
        config["tie_word_embeddings"] = "lm_head.weight" not in self.shapes
        if self.architecture == "qwen2":
            del config["head_dim"]
        if self.architecture.startswith("gemma"):
            of_27b = self.architecture == "gemma2" and config["num_hidden_layers"] == 46
            heads = config["hidden_size"] // config["num_attention_heads"]
            config["query_pre_attn_scalar"] = heads if of_27b else width
        if self.architecture.startswith("qwen"):
            config.pop("sliding_window", None)
        ends = {f"{name}_token_id": self.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
        return config | ends | {"rope_scaling": self.read_scaling(config["max_position_embeddings"])}

    def read_scaling(self, length: int) -> dict[str, Any] | None:
        """RoPE's scaling. Llama 3.1's bands are stored as the divisor of each frequency."""
        if self.frequencies is not None:
            divisors = [float(x) for x in self.frequencies.data.reshape(-1)]
            lists = {"short_factor": divisors, "long_factor": divisors}
            return {"rope_type": "longrope", "factor": 1.0, "attention_factor": 1.0, **lists}
        kind, prefix = self.get(f"{self.architecture}.rope.scaling.type"), f"{self.architecture}.rope.scaling."
        if kind in (None, "none"):
            return None
        if kind not in ("linear", "yarn"):
            raise PretrainedError(f"{self.path} scales RoPE by {kind!r}: linear and yarn are read")
        original = self.get(prefix + "original_context_length", length) if kind == "yarn" else None
        return {"rope_type": kind, "factor": self.get(prefix + "factor"), "original_max_position_embeddings": original}

    def check_dtype(self, name: str) -> None:
        """Every kind of number in a GGUF file is dequantised."""

    def dtype_of(self, name: str) -> torch.dtype:
        """What a tensor becomes where no dtype is asked for: fp32, as in transformers."""
        return torch.float32

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """A tensor as it is on the hub."""
        from gguf import dequantize

        stored = self.tensors[name]
        x = torch.from_numpy(dequantize(stored.data, stored.tensor_type).copy()).view(self.shapes[name])
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        if self.architecture == "llama" and heads:
            x = x.unflatten(0, (self.config[heads], -1, 2)).transpose(1, 2).flatten(0, 2)
        elif self.architecture.startswith("gemma") and name.endswith("norm.weight"):
            x = x - 1
        return x.to(dtype)


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that `path` is, or the only one of a folder without .safetensors files, which come first; None for
    other paths and for a run directory. Of a file in several parts it is one part, which GGUFFile refuses.

    Raises PretrainedError for a folder with several.
    """
    if path.suffix == ".gguf" and path.is_file():
        return path
    if any(path.glob("*.safetensors*")) or (path / "checkpoints").exists():
        return None
    found = sorted(path.glob("*.gguf"))
    files = [file for file in found if part_of(file.name)[0] == 1] or found[:1]
    if len(files) > 1:
        raise PretrainedError(f"{path} holds {len(files)} GGUF files: name one, such as {files[0]}")
    return files[0] if files else None


def part_of(name: str) -> tuple[int, int]:
    """Which part of how many a file of this name is, as in model-00001-of-00002.gguf; (1, 1) for a whole one."""
    found = re.fullmatch(r".*-(\d{5})-of-(\d{5})\.gguf", name)
    return (int(found[1]), int(found[2])) if found else (1, 1)
