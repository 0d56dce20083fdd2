"""What a box says: a title from the name of its class, and facts from its public attributes.

Numbers, names of functions and switches that are on are facts. Defaults of 0, 1 and True and small numbers, such as the
eps of a norm, are kept as settings, which the page shows beside the picture.
"""

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from llm.modules.masks import Mask

KINDS = ("position_encoding", "norms", "masks", "ffn", "attention", "recurrent", "sparse")
NAMES = {"position_encoding": "position", "norms": "norm", "masks": "mask", "ffn": "ffn"}
BOOKKEEPING = ("training", "layer", "call_super_init", "dump_patches")


def title_of(module: nn.Module) -> str:
    title = getattr(module, "title", None)
    return title if isinstance(title, str) else words(type(module).__name__)


WORD = re.compile(
    r"RoPE|NoPE|ALiBi|MoE|YaRN|BigBird|(?:RMS|Layer|QK)Norm|[A-Z]{2,}(?![a-z])|[A-Z]?[a-z]+|[A-Z]?[0-9]+|[A-Z]+"
)


def words(name: str) -> str:
    """`SoftmaxRouter` -> `Softmax router`; acronyms stay as they are."""
    pieces = [piece.lower() if piece.istitle() else piece for piece in WORD.findall(name)]
    text = " ".join(pieces)
    return text[:1].upper() + text[1:]


def facts_of(module: nn.Module) -> Iterator[str]:
    """What the module's public attributes say, without its weights; first its class, where a base gave the title."""
    if "title" not in vars(type(module)) and hasattr(module, "title"):
        yield words(type(module).__name__)
    defaults = defaults_of(type(module))
    for name, value in attributes(module).items():
        if not is_quiet(value, defaults.get(name)) and (text := fact(name, value)):
            yield text
    layers = [name for name, child in module.named_children() if getattr(child, "bias", None) is not None]
    biased = [name for name in layers if not is_ours(type(getattr(module, name)))]
    biased += [name for name, _ in module.named_parameters(recurse=False) if name.endswith("bias")]
    if biased:
        yield "bias" if biased == ["bias"] else f"bias in {', '.join(name.removesuffix('_bias') for name in biased)}"


def settings_of(module: nn.Module) -> Iterator[str]:
    """The attributes that a picture has no place for: defaults that change nothing, and small numbers."""
    defaults = defaults_of(type(module))
    for name, value in attributes(module).items():
        if is_quiet(value, defaults.get(name)) and (text := fact(name, value)):
            yield text


def attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name[0] != "_" and name not in BOOKKEEPING}


def is_quiet(value: Any, default: Any) -> bool:
    small = isinstance(value, float) and abs(value) <= 0.01
    return small or (isinstance(value, int | float) and value == default and value in (0, 1))


def defaults_of(cls: type) -> dict[str, Any]:
    """The defaults of the constructor's arguments, also of those that it hands on as `**options`."""
    found = {}
    for base in reversed(cls.__mro__):
        if is_ours(base) and "__init__" in vars(base):
            found |= {p.name: p.default for p in inspect.signature(base.__init__).parameters.values()}
    return found


def fact(name: str, value: Any) -> str:
    match value:
        case True:
            return name
        case False | None | Tensor() | Mask() | nn.Module():
            return ""
        case int() | float() | str():
            return f"{name} {number(value)}"
        case list() | tuple() if value and all(isinstance(item, int) for item in value):
            return f"{name} {' + '.join(map(number, value))}"
    function = function_of(value)
    if name == "score_bias":  # ALiBi, which has no weights: a box of its own
        return ""
    if function is None or kind_of(function.__module__) == "position":
        return f"{name} {type(value).__name__}" if dataclasses.is_dataclass(value) else ""
    return f"{name} {function.__name__}"


def number(value: int | float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if value == int(value) else f"{value:.4g}"


def matrices_of(module: nn.Module) -> Iterator[str]:
    """Weights that belong to no box of their own: PyTorch's layers, and the module's parameters."""
    for name, child in module.named_children():
        weight = getattr(child, "weight", None)
        if isinstance(child, nn.Linear):
            yield f"{name} {child.in_features} → {child.out_features}{' + bias' if child.bias is not None else ''}"
        elif isinstance(weight, Tensor) and not is_ours(type(child)):
            yield f"{name} {' × '.join(map(str, weight.shape))}"
    for name, parameter in module.named_parameters(recurse=False):
        yield f"{name} {' × '.join(map(str, parameter.shape))}"


def function_of(value: Any) -> Callable | None:
    function = value.func if isinstance(value, partial) else value
    return function if inspect.isroutine(function) and hasattr(function, "__name__") else None


def is_ours(cls: type) -> bool:
    return cls.__module__.startswith("llm.")


def kind_of(module: str) -> str:
    folder = next((kind for kind in KINDS if f".{kind}" in module), "")
    return NAMES.get(folder, "mixer" if folder else "other")
