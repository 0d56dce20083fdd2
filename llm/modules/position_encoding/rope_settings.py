"""Settings of RoPE, and the scaling that they ask for.

A model's config holds the base of the rotation as `rope_theta` and the way to longer contexts as `rope_scaling`: a dict
such as {"rope_type": "llama3", "factor": 8.0, ..}, empty for the plain rotation.
Blog: Position encoding, longer context.
"""

from collections.abc import Callable

from llm.modules.position_encoding.context_extension import (
    DynamicNTK,
    LinearInterpolation,
    Llama3Bands,
    LongRoPE,
    YaRN,
)
from llm.modules.position_encoding.rope import Scaling

Settings = dict[str, bool | int | float | str | list[float]]

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
    "longrope": (LongRoPE, {"factor", LENGTH, "short_factor", "long_factor"}, {"attention_factor"}),
}


def make_scaling(settings: Settings) -> Scaling | None:
    """The scaling that `RoPE` takes; None where `settings` are empty.

    Raises ValueError for a rope_type that is not implemented (proportional, ..), for settings that are missing or that
    the type does not know, and for text where a number is needed.
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
        if not fits(name, value):
            raise ValueError(f"rope_scaling of rope_type {kind!r} sets {name} to {value!r}: that is no value for it")
    return make(**{"original_length" if name == LENGTH else name: value for name, value in given.items()})


def fits(name: str, value: bool | int | float | str | list[float]) -> bool:
    """Whether a setting holds what its name asks for: true or false, a list of numbers above zero, or a number."""
    if name == "truncate":
        return isinstance(value, bool)
    if name in ("short_factor", "long_factor"):
        return isinstance(value, list | tuple) and all(is_number(x) and x > 0 for x in value)
    return is_number(value)


def is_number(value: bool | int | float | str | list[float]) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
