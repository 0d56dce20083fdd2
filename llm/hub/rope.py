"""The settings of RoPE as config.json spells them, read into `rope_theta` and `rope_scaling` and written back.

Two spellings are in use: `rope_theta` beside `rope_scaling` (transformers 4), and everything in `rope_parameters`
(transformers 5), either once or for each type of layer.
"""

from typing import Any

from llm.hub.tables import check_kind
from llm.modules.position_encoding.rope_settings import LENGTH, make_scaling

NOT_SETTINGS = {"rope_type", "type", "finetuned", "partial_rotary_factor"}


def read_rope(left: dict[str, Any], ours: dict[str, Any], default_theta: float = 10_000.0) -> dict[str, Any]:
    """Take RoPE's settings, in either spelling, out of the fields that are `left`: -> `rope_theta` and `rope_scaling`.

    `ours` holds `max_seq_len`. Dynamic NTK takes it for the length in training, and `factor` times that as the new one.
    """
    scaling, parameters = take_settings(left, "rope_scaling"), take_settings(left, "rope_parameters")
    return normalise(scaling or parameters, take_theta(left, "rope_theta", default_theta), ours["max_seq_len"])


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
    """One dict of settings as published -> `rope_theta` and `rope_scaling` (and `max_seq_len` for dynamic NTK).

    Raises ValueError where only a part of each head turns, where there is a dict for each type of layer although the
    model has one RoPE for all, and for what `make_scaling` refuses.
    """
    settings = dict(settings)
    theta = take_theta(settings, "rope_theta", default_theta)
    kind = settings.get("rope_type", settings.get("type", "default"))
    if settings.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"partial_rotary_factor = {settings['partial_rotary_factor']}: this model turns whole heads")
    rest = {name: value for name, value in settings.items() if name not in NOT_SETTINGS and value is not None}
    if kind == "default":
        for name, value in rest.items():
            check_kind(f"{name} of RoPE", value, float)
        return {"rope_theta": theta, "rope_scaling": {}}
    if kind == "dynamic":
        rest[LENGTH] = max_length  # as transformers does, which does not read the length in the settings
    elif kind in ("yarn", "llama3"):
        rest.setdefault(LENGTH, max_length)
    scaling = {"rope_type": kind, **rest}
    make_scaling(scaling)
    longer = {"max_seq_len": int(rest["factor"] * max_length)} if kind == "dynamic" else {}
    return {"rope_theta": theta, "rope_scaling": scaling, **longer}


def write_rope(config: Any) -> dict[str, Any]:
    """Our config -> `rope_theta` and `rope_scaling`, the spelling that every version of transformers reads."""
    scaling = dict(config.rope_scaling)
    trained = {"max_position_embeddings": scaling.pop(LENGTH)} if scaling.get("rope_type") == "dynamic" else {}
    return {"rope_theta": config.rope_theta, "rope_scaling": scaling or None, **trained}
