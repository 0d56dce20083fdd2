"""GGUF files: one file with the weights, mostly quantised, the sizes and the tokenizer, as llama.cpp has them.

    model = load_pretrained("model.gguf")

The package `gguf` (an extra: `uv sync --extra gguf`) reads the file and dequantises one tensor at a time, of stacked
experts one expert. This module gives tensors and sizes the names that the same model has on the hub, so that
llm/hub/maps/ reads both; llm/hub/gguf_layouts.py has the names.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llm.hub.folder import check_not_a_pointer
from llm.hub.gguf_layouts import LAYOUTS, MIXTRAL, Layout
from llm.hub.tables import PretrainedError

READ_ELSEWHERE = re.compile(
    r"vocab_size|attention\.(value_length|causal|sliding_window_pattern)|rope\.(dimension_count|scaling\..*)|pooling_type"
)
"""Fields of an architecture that are no size of LAYOUTS and are checked or read, and the kind of an embedding."""
YARN = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}
LONG, SHORT, DIVISORS = "rope_factors_long.weight", "rope_factors_short.weight", "rope_freqs.weight"


class Stored(NamedTuple):
    """Where a tensor of the hub is in the file."""

    tensor: Any
    """What the package `gguf` read, quantised."""
    part: str
    """Its name without `blk.N.`, which says how it was changed."""
    expert: int | None
    """Its place in a stack of experts."""


class GGUFFile:
    """A GGUF file, which has the tensors of a hub folder under their published names, read one at a time.

    `config` are the fields of its config.json. Raises PretrainedError where the package `gguf` is missing, for a part
    of a file or a note of Git LFS, and for an architecture, a field or a tensor that is not known here.
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
        self.layout = self.find_layout()
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.factors = {
            name: [float(x) for x in tensors.pop(name).data.reshape(-1)]
            for name in (LONG, SHORT, DIVISORS)
            if name in tensors
        }
        self.tensors = {name: stored for tensor in tensors.values() for name, stored in self.published(tensor)}
        self.config = self.read_config()
        self.shapes = {name: tuple(self.change(stored, meta(stored)).shape) for name, stored in self.tensors.items()}

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a field of the file's metadata."""
        return self.fields[name].contents() if name in self.fields else default

    def size(self, name: str, default: Any = None) -> Any:
        """The value of a field of the architecture."""
        return self.get(f"{self.architecture}.{name}", default)

    def find_layout(self) -> Layout:
        """How the file's architecture is stored. Mixtral is a `llama` with experts."""
        if self.architecture not in LAYOUTS:
            known = ", ".join(LAYOUTS)
            raise PretrainedError(f"{self.path} holds a {self.architecture!r}; of GGUF files, {known} are read")
        return MIXTRAL if self.architecture == "llama" and self.size("expert_count") else LAYOUTS[self.architecture]

    def published(self, tensor: Any) -> list[tuple[str, Stored]]:
        """The tensors of the hub that a tensor of the file holds: one, or one for each expert."""
        found = re.fullmatch(r"(?:blk\.(\d+)\.)?(.+?)(?:\.(weight|bias))?", tensor.name)
        layer, stem, kind = found.groups()
        part = stem if kind is None else f"{stem}.{kind}"
        names = self.layout.names
        template = names.get(part) or (f"{names[stem]}.{kind}" if kind and stem in names else None)
        if template is None or ("{layer}" in template) != (layer is not None):
            raise PretrainedError(f"{self.path} holds {tensor.name}, which a {self.architecture} here does not have")
        if "{expert}" not in template:
            return [(template.format(layer=layer), Stored(tensor, part, None))]
        experts = range(int(tensor.shape[-1]))
        return [(template.format(layer=layer, expert=i), Stored(tensor, part, i)) for i in experts]

    def read_config(self) -> dict[str, Any]:
        """The fields of config.json that the metadata say."""
        found = {theirs: self.size(ours) for ours, theirs in self.layout.sizes.items()}
        config = {name: value for name, value in found.items() if value is not None}
        config |= {"model_type": self.layout.model_type, **self.layout.fixed}
        ends = {f"{name}_token_id": self.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
        embedding = self.tensors.get(f"{self.layout.names['token_embd']}.weight")
        if embedding is None:
            raise PretrainedError(f"{self.path} holds no token_embd.weight, the embedding: download it again")
        config["vocab_size"] = int(embedding.tensor.shape[-1])
        config["tie_word_embeddings"] = "lm_head.weight" not in self.tensors
        self.check_fields()
        if self.architecture not in ("gpt2", "mamba"):
            self.read_attention(config)
        return config | ends

    def read_attention(self, config: dict[str, Any]) -> None:
        """Add what the metadata say about heads, windows and RoPE."""
        width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        turned = self.size("rope.dimension_count", width)
        if self.architecture == "phi3":
            config["partial_rotary_factor"] = turned / width
            config["sliding_window"] = config.get("sliding_window") or None  # 0: no window
        elif turned != width:
            raise PretrainedError(f"{self.path} turns {turned} of the {width} channels of a head: all or none are read")
        if self.size("attention.value_length", width) != width:
            raise PretrainedError(f"{self.path} has values of another width than keys, {width}")
        if self.architecture not in ("qwen2", "phi3", "lfm2"):
            config["head_dim"] = width
        if self.architecture in ("gemma2", "gemma3"):
            of_27b = self.architecture == "gemma2" and config["num_hidden_layers"] == 46
            heads = config["hidden_size"] // config["num_attention_heads"]
            config["query_pre_attn_scalar"] = heads if of_27b else width
        if isinstance(kv_heads := config.get("num_key_value_heads"), list):  # LFM2: 0 in layers with a convolution
            config["full_attn_idxs"] = [layer for layer, n in enumerate(kv_heads) if n]
            config["num_key_value_heads"] = max(kv_heads)
        if windows := self.size("attention.sliding_window_pattern"):
            config["layer_types"] = ["sliding_attention" if window else "full_attention" for window in windows]
            if self.architecture == "olmo2":
                config["model_type"] = "olmo3"
                config.setdefault("rope_local_base_freq", config["rope_theta"])
        config["rope_scaling"] = self.read_scaling(config["max_position_embeddings"])

    def check_fields(self) -> None:
        """Raises PretrainedError for a field of the architecture that is set and not known here."""
        prefix, left = f"{self.architecture}.", {}
        for name in self.fields:
            field = name.removeprefix(prefix)
            if name.startswith(prefix) and field not in self.layout.sizes and not READ_ELSEWHERE.fullmatch(field):
                left[name] = self.get(name)
        listed = ", ".join(f"{name} = {value!r}" for name, value in left.items() if value)
        if listed or self.size("attention.causal") is False:
            listed = listed or f"{prefix}attention.causal = False"
            raise PretrainedError(f"{self.path} sets {listed}, which this code does not know and would have to ignore")

    def read_scaling(self, length: int) -> dict[str, Any] | None:
        """RoPE's scaling. Llama 3.1's bands are stored as the divisor of each frequency, Phi-3's as two lists."""
        original = self.size("rope.scaling.original_context_length", length)
        if DIVISORS in self.factors:
            lists = {"short_factor": self.factors[DIVISORS], "long_factor": self.factors[DIVISORS]}
            return {"rope_type": "longrope", "factor": 1.0, "attention_factor": 1.0, **lists}
        if LONG in self.factors:
            lists = {"short_factor": self.factors[SHORT], "long_factor": self.factors[LONG]}
            found = {"rope_type": "longrope", "original_max_position_embeddings": original, **lists}
            magnitude = self.size("rope.scaling.attn_factor")
            return found if magnitude is None else found | {"attention_factor": magnitude}
        kind = self.size("rope.scaling.type")
        if kind in (None, "none"):
            return None
        if kind not in ("linear", "yarn"):
            raise PretrainedError(f"{self.path} scales RoPE by {kind!r}: linear and yarn are read")
        found = {"rope_type": kind, "factor": self.size("rope.scaling.factor")}
        return found | self.read_yarn(original) if kind == "yarn" else found

    def read_yarn(self, original: int) -> dict[str, Any]:
        """YaRN's settings. GPT-OSS does not round the borders of its bands, which no field says.

        Raises PretrainedError for a factor of the magnitude: llama.cpp's converter writes the one that stands in place
        of YaRN's own (attention_factor) and the one that multiplies it (attn_factor) into the same field.
        """
        prefix = "rope.scaling."
        factors = {
            name: self.size(prefix + name) for name in ("attn_factor", "yarn_attn_factor", "yarn_log_multiplier")
        }
        listed = ", ".join(f"{name} = {value}" for name, value in factors.items() if value is not None)
        if listed or self.size(prefix + "yarn_ext_factor", 1) != 1:
            raise PretrainedError(f"{self.path} scales RoPE by yarn with {listed or 'yarn_ext_factor'}: not known here")
        bands = {theirs: self.size(prefix + ours) for ours, theirs in YARN.items()}
        exact = {"truncate": False} if self.architecture == "gpt-oss" else {}
        known = {name: value for name, value in bands.items() if value is not None}
        return {"original_max_position_embeddings": original, **known, **exact}

    def check_dtype(self, name: str) -> None:
        """Every kind of number in a GGUF file is dequantised."""

    def dtype_of(self, name: str) -> torch.dtype:
        """What a tensor becomes where no dtype is asked for: fp32, as in transformers."""
        return torch.float32

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """A tensor as it is on the hub."""
        from gguf import dequantize

        stored = self.tensors[name]
        data = stored.tensor.data if stored.expert is None else stored.tensor.data[stored.expert]
        x = torch.from_numpy(dequantize(data, stored.tensor.tensor_type).copy())
        return self.change(stored, x.view(meta(stored).shape)).to(dtype)

    def change(self, stored: Stored, x: Tensor) -> Tensor:
        """Undo what llama.cpp's converter did to the numbers."""
        changes, stem = self.layout.changes, re.sub(r"\.(weight|bias)$", "", stored.part)
        change = changes.get(stored.part) or changes.get(stem)
        return change(x, self.config) if change else x


def meta(stored: Stored) -> Tensor:
    """A tensor without numbers in the shape in which the file holds it."""
    shape = tuple(map(int, reversed(stored.tensor.shape)))
    return torch.empty(shape if stored.expert is None else shape[1:], device="meta")


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
