"""From a model to its Diagram, by one walk over the module tree that knows no model.

A box is a class that this repository defines. Its title is its name, its facts are its public attributes, and the boxes
inside it are the modules, masks and functions that it holds. A module may say `title`, where the name of its class says
too little: the same MultiHeadAttention is multi-head, grouped-query or multi-query.
"""

import dataclasses
import inspect
import sys
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import nn

from llm.gallery.diagram import Block, Diagram, Part
from llm.gallery.docstrings import about, first_sentence, own_doc, prefix
from llm.gallery.fold import fold
from llm.gallery.labels import (
    BOOKKEEPING,
    fact,
    facts_of,
    function_of,
    is_ours,
    kind_of,
    matrices_of,
    settings_of,
    title_of,
    words,
)
from llm.gallery.wiring import ALONE, chain, missing_inputs, trace
from llm.models.transformer import Transformer
from llm.modules.masks import Mask

SKELETON = ("tok_embed", "blocks", "norm", "lm_head")


def describe(model: Transformer, name: str = "", subtitle: str = "") -> Diagram:
    """The picture of `model`; it may be on the meta device, since no weight is read."""
    extra = [slot for slot, _ in model.named_children() if slot not in (*SKELETON, *model.training_only)]
    wired = zip(model.blocks, missing_inputs(model), strict=True)
    blocks = [describe_block(block, f"blocks.{i}", missing) for i, (block, missing) in enumerate(wired)]
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


def is_container(module: nn.Module) -> bool:
    """Whether a module only holds others: PyTorch's own lists, not our classes that compute with theirs."""
    return isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential) and not is_ours(type(module))


def parts_at(model: Transformer, slot: str) -> list[Part]:
    """The boxes of a child of the model, of each module in it where it is a list."""
    child = getattr(model, slot)
    return list(parts_of_children(child, slot, slot)) if is_container(child) else [part_of(child, slot, slot)]


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


def describe_block(block: nn.Module, path: str, missing: frozenset[str] = ALONE) -> Block:
    """`missing`: the inputs that the model does not give to this block."""
    parts = tuple(parts_of_children(block, "", path))
    nodes = trace(block, missing)
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
        if is_container(child):
            yield from parts_of_children(child, inner_slot, inner_path)
        elif is_ours(type(child)):
            yield part_of(child, inner_slot, inner_path)


def parts_of_attributes(module: nn.Module, slot: str) -> Iterator[Part]:
    """Masks, and functions and values that encode positions: they have no weights, so they are no modules."""
    for name, value in vars(module).items():
        if isinstance(value, Mask):
            yield mask_part(value, f"{slot}.{name}")
        elif (function := function_of(value)) and kind_of(function.__module__) == "position":
            yield function_part(function, f"{slot}.{name}")
        elif name == "score_bias" and dataclasses.is_dataclass(value):
            source = source_of(type(value))
            yield Part(f"{slot}.{name}", "position", words(type(value).__name__), source=source)


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


def is_module_part(function: Callable) -> bool:
    """Whether a function is a part of an architecture, not a kernel or the drawing of weights."""
    return function.__module__.startswith("llm.modules.") and ".kernels." not in function.__module__


def source_of(thing: Any) -> str:
    """`module:name`, by which docstrings.py finds it."""
    return f"{thing.__module__}:{thing.__qualname__}"


def source_of_step(model: Transformer, method: str) -> str:
    """The method that the model runs, in the class that defines it."""
    return source_of(inspect.unwrap(getattr(type(model), method)))


def unknown_parts(diagram: Diagram) -> list[str]:
    """Boxes about which the code says nothing, and blocks whose wiring could not be followed: best none."""
    silent = [
        part.source for part in diagram.parts() if not any((about(part.source).sentence, about(part.source).idea))
    ]
    return silent + [block.source for _, block in diagram.blocks() if not block.traced]
