"""The settings of RoPE as config.json spells them, and the scaling that they ask for.

Two spellings are in use: `rope_theta` beside `rope_scaling` (transformers 4), and all of it in `rope_parameters`
(transformers 5), once or for each type of layer. A model's config holds the base as `rope_theta` and the rest as
`rope_scaling`, a dict such as {"rope_type": "llama3", "factor": 8.0, ..}, empty for the plain rotation.
Blog: Position encoding, longer context.
"""

from collections.abc import Callable
from typing import Any

from llm.modules.position_encoding.context_extension import DynamicNTK, LinearInterpolation, Llama3Bands, YaRN
from llm.modules.position_encoding.rope import Scaling
from llm.name_table import check_kind

Settings = dict[str, bool | int | float | str]

LENGTH = "original_max_position_embeddings"
# rope_type -> what makes the scaling, and the settings that it must and may have
KINDS: dict[str, tuple[Callable[..., Scaling], set[str], set[str]]] = {
    "linear": (LinearInterpolation, {"factor"}, set()),
    "dynamic": (DynamicNTK, {"factor", LENGTH}, set()),
    "yarn": (
        YaRN,
        {"factor", LENGTH},
        {"beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim"},
    ),
    "llama3": (Llama3Bands, {"factor", LENGTH}, {"low_freq_factor", "high_freq_factor"}),
}
MEANINGLESS = {"type", "finetuned"}


def make_scaling(settings: Settings) -> Scaling | None:
    """The scaling that `RoPE` takes; None where `settings` are empty.

    Raises ValueError for a rope_type that is not implemented (longrope, ..), for settings that are missing or that the
    type does not know, and for text where a number is needed.
    """
    if not settings:
        return None
    kind = settings.get("rope_type")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"rope_type = {kind!r} is not supported: rope_scaling knows {', '.join(KINDS)}")
    make, needed, optional = KINDS[kind]
    given = {name: value for name, value in settings.items() if name != "rope_type"}
    for problem, names in (("lacks", needed - given.keys()), ("has unknown", given.keys() - needed - optional)):
        if names:
            raise ValueError(f"rope_scaling of rope_type {kind!r} {problem} {', '.join(sorted(names))}")
    for name, value in given.items():
        wanted = bool if name == "truncate" else (int, float)
        if not isinstance(value, wanted) or (wanted is not bool and isinstance(value, bool)):
            raise ValueError(f"rope_scaling of rope_type {kind!r} sets {name} to {value!r}: that is no value for it")
    return make(**{"original_length" if name == LENGTH else name: value for name, value in given.items()})


def read_rope(left: dict[str, Any], ours: dict[str, Any], default_theta: float = 10_000.0) -> dict[str, Any]:
    """Take the settings of RoPE, in either spelling, out of what is `left` of a config.json: -> `rope_theta` and
    `rope_scaling`. `ours` holds `max_seq_len`: where dynamic NTK is asked for, that is the length the model was trained
    at, and factor times that is the new one."""
    scaling, parameters = take_settings(left, "rope_scaling"), take_settings(left, "rope_parameters")
    return normalise(scaling or parameters, take_theta(left, "rope_theta", default_theta), ours["max_seq_len"])


def take_settings(left: dict[str, Any], name: str) -> dict[str, Any]:
    """Take a field with settings out of what is `left`: empty where there is none."""
    settings = left.pop(name, None)
    check_kind(name, settings, dict, nullable=True)
    return dict(settings or {})


def take_theta(left: dict[str, Any], name: str, default: float) -> float:
    """Take a base of the rotation out of what is `left`."""
    theta = left.pop(name, None)
    check_kind(name, theta, float, nullable=True)
    return default if theta is None else theta


def normalise(settings: dict[str, Any], default_theta: float, max_length: int) -> dict[str, Any]:
    """One dict of settings as published -> `rope_theta` and `rope_scaling` (and `max_seq_len` for dynamic NTK).

    Raises ValueError where only a part of each head turns, where there is a dict for each type of layer and the model
    has one RoPE for all, and for what `make_scaling` refuses.
    """
    settings = dict(settings)
    theta = take_theta(settings, "rope_theta", default_theta)
    kind = settings.get("rope_type", settings.get("type", "default"))
    if settings.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"partial_rotary_factor = {settings['partial_rotary_factor']}: this model turns whole heads")
    dropped = MEANINGLESS | {"partial_rotary_factor", "rope_type"}
    rest = {name: value for name, value in settings.items() if name not in dropped and value is not None}
    if kind == "default":
        for name, value in rest.items():
            check_kind(f"{name} of RoPE", value, float)
        return {"rope_theta": theta, "rope_scaling": {}}
    if kind == "dynamic":
        rest[LENGTH] = max_length  # whatever is written there: transformers does not look at it
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
