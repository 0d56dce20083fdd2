"""From a model to its Diagram, by one walk over the module tree that knows no model.

A box is a class that this repository defines. Its title is its name, its facts are its public attributes, and the boxes
inside it are the modules, masks and functions that it holds. A module may say `title`, where the name of its class says
too little: the same MultiHeadAttention is multi-head, grouped-query or multi-query.
"""

import dataclasses
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from llm.gallery.diagram import Block, Diagram, Part
from llm.gallery.docstrings import about, first_sentence, own_doc, prefix
from llm.gallery.fold import fold
from llm.gallery.wiring import chain, trace
from llm.models.transformer import Transformer
from llm.modules.masks import Mask

KINDS = ("position_encoding", "norms", "masks", "ffn", "attention", "recurrent", "sparse")
NAMES = {"position_encoding": "position", "norms": "norm", "masks": "mask", "ffn": "ffn"}
BOOKKEEPING = ("training", "layer", "call_super_init", "dump_patches")
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
SKELETON = ("tok_embed", "blocks", "norm", "lm_head")


def describe(model: Transformer, name: str = "", subtitle: str = "") -> Diagram:
    """The picture of `model`; it may be on the meta device, since no weight is read."""
    extra = [slot for slot, _ in model.named_children() if slot not in (*SKELETON, *model.training_only)]
    blocks = [describe_block(block, f"blocks.{i}") for i, block in enumerate(model.blocks)]
    used_by_embed = names_in(model, "embed")
    held = [part for slot in extra if slot in used_by_embed for part in parts_at(model, slot)]
    free = [part for slot in extra if slot not in used_by_embed for part in parts_at(model, slot)]
    final_norm = () if isinstance(model.norm, nn.Identity) else (part_of(model.norm, "norm", "norm"),)
    return Diagram(
        name=name or type(model).__name__,
        subtitle=subtitle,
        before=(embedding(model, held), *free),
        stacks=fold(blocks),
        after=(*final_norm, head(model)),
        training_only=tuple(part for slot in model.training_only for part in parts_at(model, slot)),
        note=run_note(model),
    )


def parts_at(model: Transformer, slot: str) -> list[Part]:
    """The boxes of a child of the model, of each module in it where it is a list."""
    child = getattr(model, slot)
    return list(parts_of_children(child, slot, slot)) if isinstance(child, CONTAINERS) else [part_of(child, slot, slot)]


def embedding(model: Transformer, held: list[Part]) -> Part:
    """The token embedding, with what `embed` adds to it."""
    table = model.tok_embed
    functions = called(model, "embed")
    return Part(
        slot="tok_embed",
        kind="embedding",
        title="Token embedding",
        facts=(
            f"vocab_size {table.num_embeddings:,}",
            f"d_model {table.embedding_dim:,}",
            *(["times sqrt(d_model)"] if scales_embedding(type(model)) else []),
        ),
        matrices=(f"weight {table.num_embeddings} × {table.embedding_dim}",),
        parts=(*held, *functions),
        path="tok_embed",
        source=source_of_step(model, "embed"),
        parameters=table.weight.numel(),
    )


@cache
def scales_embedding(Model: type[Transformer]) -> bool:
    """Whether `embed` multiplies by sqrt(d_model): found by its effect in a small model of this class."""
    with torch.random.fork_rng():
        model = Model(Model.Config(**{**Model.Config.small, "vocab_size": 2}))
    tokens, positions = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        before = model.embed(tokens, positions)
        model.tok_embed.weight += 1
        factor = (model.embed(tokens, positions) - before).mean().item()
    return abs(factor / model.config.d_model**0.5 - 1) < 0.01


def head(model: Transformer) -> Part:
    """The product that makes logits, with what `unembed` does beside it."""
    vocab_size, d_model = model.head_weight().shape
    tied = model.config.tie_embeddings
    return Part(
        slot="head",
        kind="head",
        title="Output head",
        facts=(f"vocab_size {vocab_size:,}", "tied to the token embedding" if tied else "a matrix of its own"),
        matrices=() if tied else (f"lm_head {d_model} → {vocab_size}",),
        parts=tuple(called(model, "unembed")),
        path="tok_embed" if tied else "lm_head",
        source=source_of_step(model, "unembed"),
        parameters=0 if tied else model.head_weight().numel(),
    )


def run_note(model: Transformer) -> str:
    """What `run_blocks` says of itself, where the model has its own."""
    own = type(model).run_blocks
    if own is Transformer.run_blocks:
        return ""
    return first_sentence(own_doc(own)) or "the blocks read more than the stream"


def describe_block(block: nn.Module, path: str) -> Block:
    parts = tuple(parts_of_children(block, "", path))
    nodes = trace(block)
    return Block(
        title=title_of(block),
        parts=parts,
        nodes=nodes or chain([part.slot for part in parts]),
        source=source_of(type(block)),
        path=path,
        traced=nodes is not None,
    )


def part_of(module: nn.Module, slot: str, path: str) -> Part:
    """A module of this repository as a box, with the parts that it holds."""
    inner = [*parts_of_children(module, slot, path), *parts_of_attributes(module, slot)]
    return Part(
        slot=slot,
        kind=slot if slot in ("mixer", "ffn") else kind_of(type(module).__module__),
        title=title_of(module),
        facts=tuple(facts_of(module)),
        settings=tuple(settings_of(module)),
        matrices=tuple(matrices_of(module)),
        parts=tuple(merge(inner)),
        path=path,
        source=source_of(type(module)),
        parameters=sum(p.numel() for p in module.parameters()),
    )


def parts_of_children(module: nn.Module, slot: str, path: str) -> Iterator[Part]:
    for name, child in module.named_children():
        inner_slot, inner_path = f"{slot}.{name}".strip("."), f"{path}.{name}"
        if isinstance(child, CONTAINERS):
            yield from parts_of_children(child, inner_slot, inner_path)
        elif is_ours(type(child)):
            yield part_of(child, inner_slot, inner_path)


def parts_of_attributes(module: nn.Module, slot: str) -> Iterator[Part]:
    """Masks, and functions that encode positions: they have no weights, so they are no modules."""
    for name, value in vars(module).items():
        if isinstance(value, Mask):
            yield mask_part(value, f"{slot}.{name}")
        elif (function := function_of(value)) and kind_of(function.__module__) == "position":
            yield function_part(function, f"{slot}.{name}")


def mask_part(mask: Mask, slot: str) -> Part:
    values = {field.name: getattr(mask, field.name) for field in dataclasses.fields(mask)}
    facts = [fact(name, value) for name, value in values.items() if name not in BOOKKEEPING]
    return Part(slot, "mask", f"{words(type(mask).__name__)} mask", tuple(facts), source=source_of(type(mask)))


def function_part(function: Callable, slot: str) -> Part:
    title = prefix(inspect.getdoc(sys.modules[function.__module__]) or "") or words(function.__name__)
    return Part(slot, kind_of(function.__module__), title, source=source_of(function))


def merge(parts: list[Part]) -> Iterator[Part]:
    """Neighbours that are alike, such as the norms of queries and keys, become one box."""
    for part in parts:
        alike = [other for other in parts if dataclasses.replace(other, slot="") == dataclasses.replace(part, slot="")]
        if part is alike[0]:
            names = [other.slot.rpartition(".")[2] for other in alike]
            head, _, _ = part.slot.rpartition(".")
            yield dataclasses.replace(
                part,
                slot=f"{head}.{', '.join(names)}" if len(names) <= 3 else f"{head}.{names[0]} .. {names[-1]}",
                title=part.title if len(alike) < 2 else f"{len(alike)} × {part.title}",
                parameters=sum(other.parameters for other in alike),
            )


def called(model: Transformer, method: str) -> list[Part]:
    """The functions of llm/modules that a step of the model calls, where the model has its own step."""
    found = []
    for cls in classes_with(model, method):
        function = inspect.unwrap(vars(cls)[method])
        values = [function.__globals__.get(name) for name in function.__code__.co_names]
        found += [value for value in values if inspect.isfunction(value) and is_module_part(value)]
    return [function_part(function, f"{method}.{function.__name__}") for function in dict.fromkeys(found)]


def names_in(model: Transformer, method: str) -> set[str]:
    """The names that a step of the model uses."""
    steps = [inspect.unwrap(vars(cls)[method]) for cls in classes_with(model, method)]
    return {name for step in steps for name in step.__code__.co_names}


def classes_with(model: Transformer, method: str) -> list[type]:
    """The class whose step the model runs, and those that it reaches by super(), down to the skeleton's."""
    found = []
    for cls in type(model).__mro__:
        if method in vars(cls):
            if cls is Transformer:
                break
            found.append(cls)
            if "super" not in vars(cls)[method].__code__.co_names:
                break
    return found


def title_of(module: nn.Module) -> str:
    title = getattr(module, "title", None)
    return title if isinstance(title, str) else words(type(module).__name__)


WORD = re.compile(r"RoPE|NoPE|ALiBi|MoE|YaRN|BigBird|(?:RMS|Layer|QK)Norm|[A-Z]{2,}(?![a-z])|[A-Z]?[a-z]+|[A-Z]?[0-9]+|[A-Z]+")


def words(name: str) -> str:
    """`SoftmaxRouter` -> `Softmax router`; acronyms stay as they are."""
    pieces = [piece.lower() if piece.istitle() else piece for piece in WORD.findall(name)]
    text = " ".join(pieces)
    return text[:1].upper() + text[1:]


def facts_of(module: nn.Module) -> Iterator[str]:
    """What the module's public attributes say, without its weights. Where a base class gave the title, the class first."""
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


def is_module_part(function: Callable) -> bool:
    """Whether a function is a part of an architecture, not a kernel or the drawing of weights."""
    return function.__module__.startswith("llm.modules.") and ".kernels." not in function.__module__


def kind_of(module: str) -> str:
    folder = next((kind for kind in KINDS if f".{kind}" in module), "")
    return NAMES.get(folder, "mixer" if folder else "other")


def source_of(thing: Any) -> str:
    """`module:name`, by which docstrings.py finds it."""
    return f"{thing.__module__}:{thing.__qualname__}"


def source_of_step(model: Transformer, method: str) -> str:
    """The method that the model runs, in the class that defines it."""
    return source_of(inspect.unwrap(getattr(type(model), method)))


def unknown_parts(diagram: Diagram) -> list[str]:
    """Boxes about which the code says nothing, and blocks whose wiring could not be followed: best none."""
    silent = [part.source for part in diagram.parts() if not any((about(part.source).sentence, about(part.source).idea))]
    return silent + [block.source for _, block in diagram.blocks() if not block.traced]
