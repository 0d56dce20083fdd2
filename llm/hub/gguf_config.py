"""The metadata of a GGUF file, and the fields of config.json that they give.

A field that this module does not know, and that is set, stops the reading: a model built without it may compute
something else.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llm.hub.gguf_layouts import LAYOUTS, MIXTRAL, Layout
from llm.hub.tables import PretrainedError

Config = dict[str, Any]
NEEDED = ("context_length", "block_count", "embedding_length", "attention.head_count")
READ_HERE = re.compile(
    r"vocab_size|attention\.(value_length|causal|sliding_window_pattern)|rope\.(dimension_count|scaling\..*)|pooling_type"
)
"""Fields of an architecture beside the sizes of its layout: read or checked here, or of no effect (pooling)."""
YARN = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}
LONG, SHORT, DIVISORS = "rope_factors_long.weight", "rope_factors_short.weight", "rope_freqs.weight"
FACTORS = (LONG, SHORT, DIVISORS)
"""Tensors of the file that say how RoPE is scaled."""


class Metadata:
    """The fields of a file."""

    def __init__(self, path: Path, fields: Mapping[str, Any]):
        self.path, self.fields = path, fields
        self.architecture = str(self.get("general.architecture"))

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a field."""
        return self.fields[name].contents() if name in self.fields else default

    def size(self, name: str, default: Any = None) -> Any:
        """The value of a field of the architecture."""
        return self.get(f"{self.architecture}.{name}", default)

    def one_size(self, name: str) -> Any:
        """The value of a field, one for all layers where it is given for each; LFM2's numbers of key heads stay apart.

        Raises PretrainedError where layers differ.
        """
        value = self.size(name)
        if not isinstance(value, list) or (self.architecture, name) == ("lfm2", "attention.head_count_kv"):
            return value
        if len(set(value)) != 1:
            raise PretrainedError(f"{self.path} sets {self.architecture}.{name} = {value}: here all layers have one")
        return value[0]

    @property
    def layout(self) -> Layout:
        """How the architecture is stored. Mixtral is a `llama` with experts. Raises PretrainedError for others."""
        if self.architecture not in LAYOUTS:
            known = ", ".join(LAYOUTS)
            raise PretrainedError(f"{self.path} holds a {self.architecture!r}; of GGUF files, {known} are read")
        return MIXTRAL if self.architecture == "llama" and self.size("expert_count") else LAYOUTS[self.architecture]


def read_config(file: Metadata, factors: Mapping[str, list[float]], vocab_size: int, tied: bool) -> Config:
    """The fields of config.json. `factors` are the numbers of FACTORS that the file holds.

    Raises PretrainedError for what is missing, or set and not known.
    """
    layout = file.layout
    if missing := [name for name in NEEDED if name in layout.sizes and file.size(name) is None]:
        raise PretrainedError(f"{file.path} does not say its {', '.join(missing)}: download it again")
    check_fields(file)
    found = {theirs: file.one_size(ours) for ours, theirs in layout.sizes.items()}
    config = {name: value for name, value in found.items() if value is not None}
    config |= {"model_type": layout.model_type, **layout.fixed}
    config |= {f"{name}_token_id": file.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    config |= {"vocab_size": vocab_size, "tie_word_embeddings": tied}
    if "attention.head_count_kv" in layout.sizes:
        read_attention(file, config)
        config["rope_scaling"] = read_scaling(file, factors, config["max_position_embeddings"])
    return config


def check_fields(file: Metadata) -> None:
    """Raises PretrainedError for a field of the architecture that is set and not known."""
    prefix = f"{file.architecture}."
    named = {name.removeprefix(prefix): file.get(name) for name in file.fields if name.startswith(prefix)}
    left = {name: x for name, x in named.items() if name not in file.layout.sizes and not READ_HERE.fullmatch(name)}
    listed = [f"{prefix}{name} = {value!r}" for name, value in left.items() if value]
    listed += [f"{prefix}attention.causal = False"] if named.get("attention.causal") is False else []
    if listed:
        raise PretrainedError(
            f"{file.path} sets {', '.join(listed)}, which this code does not know and would have to ignore"
        )


def read_attention(file: Metadata, config: Config) -> None:
    """Add what the metadata say about heads and windows."""
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    turned = file.size("rope.dimension_count", width)
    if file.size("attention.value_length", width) != width:
        raise PretrainedError(f"{file.path} has values of another width than keys, {width}")
    if file.architecture not in ("qwen2", "phi3", "lfm2"):
        config["head_dim"] = width
    if file.architecture == "phi3":
        config["partial_rotary_factor"] = turned / width
    elif turned != width:
        raise PretrainedError(f"{file.path} turns {turned} of the {width} channels of a head: all or none are read")
    if windows := file.size("attention.sliding_window_pattern"):
        if isinstance(windows, int):  # the period, whose last layer sees all
            windows = [(layer + 1) % windows for layer in range(config["num_hidden_layers"])]
        config["layer_types"] = ["sliding_attention" if window else "full_attention" for window in windows]
    if file.architecture in OWN:
        OWN[file.architecture](config, width)


def phi(config: Config, width: int) -> None:
    """A window of 0 tokens is none."""
    config["sliding_window"] = config.get("sliding_window") or None


def gemma(config: Config, width: int) -> None:
    """The file does not say what scores are divided by: of Gemma 2 27B (46 layers) not the width of its heads."""
    of_27b = config["model_type"] == "gemma2" and config["num_hidden_layers"] == 46
    config["query_pre_attn_scalar"] = config["hidden_size"] // config["num_attention_heads"] if of_27b else width


def olmo(config: Config, width: int) -> None:
    """With windows it is an OLMo 3."""
    if "layer_types" in config:
        config["model_type"] = "olmo3"
        config.setdefault("rope_local_base_freq", config["rope_theta"])


def lfm(config: Config, width: int) -> None:
    """A layer without key heads is a convolution."""
    kv_heads = config["num_key_value_heads"]
    config["full_attn_idxs"] = [layer for layer, n in enumerate(kv_heads) if n]
    config["num_key_value_heads"] = max(kv_heads)


OWN: dict[str, Callable[[Config, int], None]] = {
    **{"phi3": phi, "gemma2": gemma, "gemma3": gemma},
    **{"olmo2": olmo, "lfm2": lfm},
}
"""What an architecture needs beyond its sizes: (the fields so far, the width of a head) -> more fields, in place."""


def read_scaling(file: Metadata, factors: Mapping[str, list[float]], length: int) -> Config | None:
    """RoPE's scaling. Llama 3.1's bands are stored as the divisor of each frequency, Phi-3's as two lists."""
    original = file.size("rope.scaling.original_context_length", length)
    if DIVISORS in factors:
        lists = {"short_factor": factors[DIVISORS], "long_factor": factors[DIVISORS]}
        return {"rope_type": "longrope", "factor": 1.0, "attention_factor": 1.0, **lists}
    if LONG in factors:
        lists = {"short_factor": factors[SHORT], "long_factor": factors[LONG]}
        found = {"rope_type": "longrope", "original_max_position_embeddings": original, **lists}
        magnitude = file.size("rope.scaling.attn_factor")
        return found if magnitude is None else found | {"attention_factor": magnitude}
    kind = file.size("rope.scaling.type")
    if kind in (None, "none"):
        return None
    if kind not in ("linear", "yarn"):
        raise PretrainedError(f"{file.path} scales RoPE by {kind!r}: linear and yarn are read")
    found = {"rope_type": kind, "factor": file.size("rope.scaling.factor")}
    return found | read_yarn(file, original) if kind == "yarn" else found


def read_yarn(file: Metadata, original: int) -> Config:
    """YaRN's settings. GPT-OSS does not round the borders of its bands, which no field says.

    Raises PretrainedError for a factor of the magnitude: llama.cpp's converter writes the one that stands in place of
    YaRN's own (attention_factor) and the one that multiplies it (attn_factor) into the same field.
    """
    prefix, names = "rope.scaling.", ("attn_factor", "yarn_attn_factor", "yarn_log_multiplier")
    given = {name: file.size(prefix + name) for name in names}
    listed = ", ".join(f"{name} = {value}" for name, value in given.items() if value is not None)
    if listed or file.size(prefix + "yarn_ext_factor", 1) != 1:
        raise PretrainedError(f"{file.path} scales RoPE by yarn with {listed or 'yarn_ext_factor'}: not known here")
    bands = {theirs: file.size(prefix + ours) for ours, theirs in YARN.items()}
    exact = {"truncate": False} if file.architecture == "gpt-oss" else {}
    known = {name: value for name, value in bands.items() if value is not None}
    return {"original_max_position_embeddings": original, **known, **exact}
