"""The settings of RoPE as config.json spells them, read into `rope_theta` and `rope_scaling` and written back.

Two spellings are in use: `rope_theta` beside `rope_scaling` (transformers 4), and everything in `rope_parameters`
(transformers 5), either once or for each type of layer.

How long a text a scaled model reads (`max_seq_len`):

    yarn, dynamic              the longer of max_position_embeddings and factor times the original length
    linear, llama3, longrope   max_position_embeddings, which in these checkpoints is the extended length

The original length is original_max_position_embeddings, or max_position_embeddings where config.json has no such field
(and for dynamic always). `load_pretrained(path, max_seq_len=..)` and `--max-seq-len` of generate set another one.
"""

import warnings
from typing import Any

from llm.hub.tables import check_kind
from llm.modules.position_encoding.rope_settings import LENGTH, make_scaling

NOT_SETTINGS = {"rope_type", "type", "finetuned", "partial_rotary_factor", "mrope_section", "mrope_interleaved"}


def read_rope(left: dict[str, Any], ours: dict[str, Any], default_theta: float = 10_000.0) -> dict[str, Any]:
    """Take RoPE's settings, in either spelling, out of the fields that are `left`: -> `rope_theta` and `rope_scaling`,
    and `max_seq_len` where the scaling makes it longer. `ours` holds `max_seq_len` as config.json has it.

    Raises ValueError where only a part of each head turns.
    """
    found = read_partial_rope(left, ours, default_theta)
    share = found.pop("partial_rotary_factor")
    if share not in (None, 1):
        raise ValueError(f"partial_rotary_factor = {share}: this model turns whole heads")
    return found


def read_partial_rope(left: dict[str, Any], ours: dict[str, Any], default_theta: float = 10_000.0) -> dict[str, Any]:
    """As `read_rope`, with `partial_rotary_factor`, the share of each head that turns; None where nothing is said."""
    scaling, parameters = take_settings(left, "rope_scaling"), take_settings(left, "rope_parameters")
    settings, outer = dict(scaling or parameters), left.pop("partial_rotary_factor", None)
    share = settings.pop("partial_rotary_factor", outer)
    check_kind("partial_rotary_factor", share, float, nullable=True)
    original = left.pop(LENGTH, None)  # Phi-3 has it beside the settings
    check_kind(LENGTH, original, nullable=True)
    if original is not None and settings.get("rope_type", settings.get("type", "default")) != "default":
        settings.setdefault(LENGTH, original)
    theta = take_theta(left, "rope_theta", default_theta)
    return {**normalise(settings, theta, ours["max_seq_len"]), "partial_rotary_factor": share}


def read_two_ropes(
    left: dict[str, Any], ours: dict[str, Any], default_far: float, default_near: float
) -> tuple[dict[str, Any], dict[str, Any]]:
    """RoPE of layers that see everything and of layers with a window, each as `normalise` returns it.

    They are read from `rope_theta`, `rope_scaling` and `rope_local_base_freq`, or from `rope_parameters` with a
    dict for each kind of layer.
    """
    parameters = take_settings(left, "rope_parameters")
    far, near = (take_settings(parameters, kind) for kind in ("full_attention", "sliding_attention"))
    far |= take_settings(left, "rope_scaling")
    if parameters:
        left["rope_parameters"] = parameters  # of kinds of layers that we do not have: an unknown field
    length = ours["max_seq_len"]
    far = normalise(far, take_theta(left, "rope_theta", default_far), length)
    return far, normalise(near, take_theta(left, "rope_local_base_freq", default_near), length)


def take_settings(left: dict[str, Any], name: str) -> dict[str, Any]:
    """Take a field that holds settings out of the fields that are `left`; empty where there is none."""
    settings = left.pop(name, None)
    check_kind(name, settings, dict, nullable=True)
    return dict(settings or {})


def take_theta(left: dict[str, Any], name: str, default: float) -> float:
    """Take a base of the rotation out of the fields that are `left`."""
    theta = left.pop(name, None)
    check_kind(name, theta, float, nullable=True)
    return default if theta is None else theta


def normalise(settings: dict[str, Any], default_theta: float, max_length: int) -> dict[str, Any]:
    """One dict of settings as published -> `rope_theta`, `rope_scaling`, and `max_seq_len` where it grows.

    `max_length` is max_position_embeddings. Raises ValueError where there is a dict for each type of layer although the
    model has one RoPE for all, and for what `make_scaling` refuses.
    """
    settings = dict(settings)
    theta = take_theta(settings, "rope_theta", default_theta)
    kind = settings.get("rope_type", settings.get("type", "default"))
    kind = "longrope" if kind == "su" else kind  # as Phi-3 first called it
    if settings.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"partial_rotary_factor = {settings['partial_rotary_factor']}: this model turns whole heads")
    rest = {name: value for name, value in settings.items() if name not in NOT_SETTINGS and value is not None}
    if kind == "default":
        for name, value in rest.items():
            check_kind(f"{name} of RoPE", value, float)
        return {"rope_theta": theta, "rope_scaling": {}}
    if kind == "dynamic":
        rest[LENGTH] = max_length  # as transformers does, which does not read the length in the settings
    elif kind in ("yarn", "llama3", "longrope"):
        rest.setdefault(LENGTH, max_length)
    if kind in ("yarn", "longrope"):
        complete(rest, max_length)
    scaling = {"rope_type": kind, **rest}
    make_scaling(scaling)
    longer = int(rest["factor"] * rest[LENGTH]) if kind in ("yarn", "dynamic") else 0
    return {"rope_theta": theta, "rope_scaling": scaling, **({"max_seq_len": longer} if longer > max_length else {})}


def complete(settings: dict[str, Any], max_length: int) -> None:
    """Add the factor where it follows from two lengths, and take away `attn_factor`, as transformers does."""
    original = settings[LENGTH]
    check_kind(LENGTH, original)
    if original > 0:
        settings.setdefault("factor", max_length / original)
    factor = settings.pop("attn_factor", 1.0)
    check_kind("attn_factor", factor, float)
    if factor != 1:
        warnings.warn(
            f"config.json sets attn_factor = {factor}, which is passed over, as transformers does; the first YaRN code "
            "multiplies by it. attention_factor, which multiplies cosines and sines, says what is meant",
            stacklevel=2,
        )


def write_rope(config: Any) -> dict[str, Any]:
    """Our config -> `rope_theta` and `rope_scaling`, the spelling that every version of transformers reads."""
    scaling = dict(config.rope_scaling)
    trained = {"max_position_embeddings": scaling.pop(LENGTH)} if scaling.get("rope_type") == "dynamic" else {}
    return {"rope_theta": config.rope_theta, "rope_scaling": scaling or None, **trained}
