"""Tables that map tensors and config fields of our models to those of published checkpoints, in both directions.

The tables of each model family are in llm/hub/maps/. This file defines their meaning and applies them.

Tensors. A row is (ours, theirs, operation): the name of a tensor here, its name in the checkpoint, and the operation
that turns their tensor into ours. Export applies the inverse operation.

    ("blocks.{layer}.mixer.*", "model.layers.{layer}.self_attn.*", same)
    ("blocks.{layer}.mixer.o_proj.weight", "h.{layer}.attn.c_proj.weight", transpose)
    (("blocks.{layer}.mixer.q_proj.bias", "blocks.{layer}.mixer.k_proj.bias", "blocks.{layer}.mixer.v_proj.bias"),
     "h.{layer}.attn.c_attn.bias", split(3))
    ("blocks.{layer}.ffn.experts.gate_up_proj[{expert}]",
     ("model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight",
      "model.layers.{layer}.mlp.experts.{expert}.up_proj.weight"), join(2))

`{layer}` is a number and `*` any text, the same on both sides. `[{expert}]` takes slices of our tensor, one for each
expert. So experts that are stacked here and separate there are copied one at a time, without memory for a second stack.
A row whose tensors the model does not have (biases, an untied head, experts) is skipped, so a table needs no
conditions. A row with several of our names is skipped where one of them is missing: `o_proj` beside `in_proj`, in a
recurrent layer, may so have another name there than `o_proj` of an attention layer. If several rows match a tensor,
loading uses the first row that has a name in the checkpoint, so one table can read two layouts. Export uses the first
row, so rows with `*` come last.

Fields. A field is (ours, theirs, default): the name here, the name in config.json, and the value that transformers uses
if config.json has none. A default that is a string names another field of ours. `required` lists fields for which our
model supports only the listed values, `ignored` those that do not affect it. `read` converts fields that need more than
a new name (RoPE: rope.py), and `write` converts them back. A value of the wrong type is an error. So is an unknown
field that is not null, false, zero or empty, since it may change the result.

To add a model, write a file with its PUBLISHED and SIZES in llm/hub/maps/ (mistral.py is the shortest example) and add
it to FAMILIES in llm/hub/maps/__init__.py. Then `load_pretrained` and `export_pretrained` work.
"""

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

from torch import Tensor, cat

Tensors = Sequence[Tensor]


class PretrainedError(ValueError):
    """A checkpoint that cannot be read or written exactly. The message names the file, field or tensor."""


@dataclass(frozen=True)
class Operation:
    """For the tensors of a row, `load` turns theirs into ours, and `save`, its inverse, turns ours into theirs."""

    load: Callable[[Tensors], Tensors]
    save: Callable[[Tensors], Tensors]
    bind: Callable[[Tensors], "Operation"] | None = None
    """Our tensors -> the operation, where their sizes decide what `load` does."""

    def then(self, other: "Operation") -> "Operation":
        """Loading applies this operation and then `other`; saving applies their inverses in reverse order."""
        return Operation(lambda theirs: other.load(self.load(theirs)), lambda ours: self.save(other.save(ours)))


same = Operation(lambda theirs: theirs, lambda ours: ours)
transpose = Operation(lambda theirs: [x.mT for x in theirs], lambda ours: [x.mT for x in ours])
"""For matrices that the checkpoint stores as (in, out), as GPT-2 does, or stacks of them (E, in, out)."""


def split(n: int, dim: int = 0) -> Operation:
    """Their tensor is n of our tensors of equal size, concatenated along `dim`."""
    return Operation(lambda theirs: theirs[0].chunk(n, dim), lambda ours: [cat(list(ours), dim)])


def split_as_ours(n_groups: int = 1) -> Operation:
    """One tensor of theirs holds several of ours, one after the other along axis 0, each as large as ours is. With
    several groups, each of `n_groups` equal parts of theirs, such as a head, holds an equal part of each of ours."""

    def save(ours: Tensors) -> Tensors:
        return [cat([x.unflatten(0, (n_groups, -1)) for x in ours], 1).flatten(0, 1)]

    def bind(ours: Tensors) -> Operation:
        sizes = [len(x) // n_groups for x in ours]

        def load(theirs: Tensors) -> Tensors:
            return [x.flatten(0, 1) for x in theirs[0].unflatten(0, (n_groups, -1)).split(sizes, 1)]

        return Operation(load, save)

    return Operation(lambda theirs: theirs, save, bind)


def join(n: int, dim: int = 0) -> Operation:
    """The inverse of `split`: our tensor is n of their tensors, concatenated along `dim`."""
    parts = split(n, dim)
    return Operation(parts.save, parts.load)


def deinterleave(dim: int) -> Operation:
    """Theirs alternates gate and up along `dim` (< 0): g0 u0 g1 u1 ..; ours is g0 g1 .. u0 u1 .. (GPT-OSS)."""
    return Operation(
        lambda theirs: [x.unflatten(dim, (-1, 2)).transpose(dim, dim - 1).flatten(dim - 1, dim) for x in theirs],
        lambda ours: [x.unflatten(dim, (2, -1)).transpose(dim, dim - 1).flatten(dim - 1, dim) for x in ours],
    )


Names = str | tuple[str, ...]
Row = tuple[Names, Names, Operation]


class Step(NamedTuple):
    """A row whose placeholders are filled in. `ours` are names, each with the index of its slice or None."""

    ours: list[tuple[str, int | None]]
    theirs: list[str]
    operation: Operation


def plan(rows: Sequence[Row], tensors: Mapping[str, Tensor], available: Collection[str] = ()) -> list[Step]:
    """The steps that fill our `tensors` from a checkpoint with the names `available`, which is empty for export.

    Raises PretrainedError for a tensor of ours that matches no row, since the table is then incomplete.
    """
    steps, planned = [], set()
    for name in tensors:
        if name in planned:
            continue
        spellings = [spelling for row in rows if (spelling := list(fill_in(row, name, tensors)))]
        if not spellings:
            raise PretrainedError(f"no row of the name table has a place for {name}")
        held = [steps for steps in spellings if any(their in available for step in steps for their in step.theirs)]
        chosen = (held or spellings)[0]
        steps += chosen
        planned |= {our for step in chosen for our, _ in step.ours}
    return steps


def fill_in(row: Row, name: str, tensors: Mapping[str, Tensor]) -> Iterator[Step]:
    """The steps that a row gives for our tensor `name`: none, one, or one for each slice."""
    ours, theirs, operation = row
    ours, theirs = as_tuple(ours), as_tuple(theirs)
    sliced = any(template.endswith(SLICE) for template in ours)
    bare = [template.removesuffix(SLICE) for template in ours]
    match = next((found for template in bare if (found := pattern(template).fullmatch(name))), None)
    if match is None:
        return
    for expert in range(len(tensors[name])) if sliced else (None,):
        values = {**match.groupdict(), "expert": expert}
        names = [write_in(t, values) for t in bare]
        if any(name not in tensors for name in names):
            return
        filled = operation.bind([tensors[name] for name in names]) if operation.bind else operation
        yield Step([(name, expert) for name in names], [write_in(t, values) for t in theirs], filled)


def parts(tensors: Mapping[str, Tensor], step: Step) -> list[Tensor]:
    """Our tensors of a step, or their slices."""
    return [tensors[name] if index is None else tensors[name][index] for name, index in step.ours]


SLICE = "[{expert}]"


def as_tuple(names: Names) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


@cache
def pattern(template: str) -> re.Pattern:
    """The regular expression of a template: `{layer}` matches a number, `*` any text."""
    text = re.escape(template).replace(r"\{layer\}", r"(?P<layer>\d+)").replace(r"\*", "(?P<rest>.+)")
    return re.compile(text)


def write_in(template: str, values: Mapping[str, Any]) -> str:
    return template.format(**values).replace("*", values.get("rest", "*"))


@dataclass(frozen=True)
class Published:
    """How transformers stores a model: the two tables that the module docstring explains."""

    model_type: str
    """The model_type in config.json."""
    architecture: str
    """The class of transformers that loads what `export_pretrained` writes."""
    names: tuple[Row, ...] | Callable[[Any], tuple[Row, ...]]
    """The table of names, or our config -> the table, where a row depends on sizes, such as the number of heads."""
    fields: tuple[tuple[str, str, Any], ...]
    required: Mapping[str, tuple] = field(default_factory=dict)
    """Their field -> the values that our model supports. The first is the default of transformers; export relies on it
    and leaves the field out. If config.json has a list, each of its items must be one of these values."""
    nullable: frozenset[str] = frozenset()
    """Their fields that may be null although their default is not."""
    own_code: bool = False
    """Whether transformers has no such class: its repository brings the code (trust_remote_code)."""
    heads_divide_width: bool = False
    """Whether transformers requires that num_attention_heads divides hidden_size, even if head_dim is set."""
    ignored: frozenset[str] = frozenset()
    """Their fields that do not affect this model, in addition to those that affect no model (IRRELEVANT)."""
    ignored_weights: Callable[[Mapping[str, Any]], str] = lambda config: ""
    """Their config -> regular expression of tensors that may be there but are not needed, such as stored masks."""
    fixed_length: bool = False
    """Whether positions are a table of weights, so that the model reads as many tokens as it was made for."""
    unwrap: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda config: config
    """config.json -> the part of it that describes this model, of one that sees images, too."""
    read: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]] = lambda left, ours: {}
    """(their fields not read yet, our fields so far) -> more of our fields; it removes the fields it reads."""
    write: Callable[[Any], dict[str, Any]] = lambda config: {}
    """The inverse of `read`: our config -> their fields, which override those from `fields`."""

    def rows(self, config: Any) -> tuple[Row, ...]:
        """The table of names for a model with our `config`."""
        return self.names(config) if callable(self.names) else self.names


# In evaluation mode the logits of the models here do not depend on these fields.
IRRELEVANT = re.compile(
    # training, bookkeeping, options of the output, and special tokens
    r"_.*|architectures|auto_map|model_type|quantization_config|transformers_version|torch_dtype|dtype|name_or_path|"
    r".*_token_id|tokenizer_class|initializer_range|use_cache|pretraining_tp|id2label|label2id|task_specific_params|"
    r"attention_dropout|hidden_dropout|output_(router_logits|attentions|hidden_states|scores)|router_aux_loss_coef|"
    r"return_dict(_in_generate)?|gradient_checkpointing|attn_implementation|num_labels|problem_type|finetuning_task|"
    # sampling, which newer checkpoints set in generation_config.json
    r"do_sample|temperature|top_[kp]|typical_p|(min|max)(_new)?_(length|tokens)|(repetition|length|diversity)_penalty|"
    r"(encoder_)?no_repeat_ngram_size|num_(beams|beam_groups|return_sequences)|early_stopping|"
    # fields that other programs add: nanotron, unsloth, transformers.js, the first LLaMA conversions
    r"internal_version|is_llama_config|unsloth_\w+|transformers\.js_config|(tokenizer_)?model_max_length|"
    r"max_sequence_length"
)


NUMBERS = {"soft_cap", "logit_soft_cap"}
"""Our fields that are numbers although their default may be null."""


def read_config(published: Published, config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of our config, read from a config.json.

    Raises PretrainedError for a value that our model does not support, and for an unknown field that is set.
    """
    left, ours = dict(published.unwrap(config)), {}
    if left.get("activation") == left.get("hidden_act"):
        left.pop("activation", None)  # the same a second time
    for name, their_name, default in published.fields:
        value = left.pop(their_name, default)
        if isinstance(default, str) and value in (None, default):
            value = ours[default]
        kind = float if name in NUMBERS else type(default) if isinstance(default, bool | float) else int
        check_kind(their_name, value, kind, nullable=default is None or their_name in published.nullable)
        ours[name] = value
    for name, allowed in published.required.items():
        require(name, left.pop(name, allowed[0]), allowed)
    ours |= published.read(left, ours)
    unknown = [name for name in left if name not in published.ignored and not IRRELEVANT.fullmatch(name)]
    listed = ", ".join(f"{name} = {left[name]!r}" for name in sorted(unknown) if left[name])
    if listed:
        raise PretrainedError(
            f"config.json of model_type {published.model_type!r} sets {listed}, which this code does not know and "
            "would have to ignore: a model built without it may compute something else"
        )
    return ours


KINDS = {bool: "true or false", int: "a whole number", float: "a number", list: "a list", dict: "an object with fields"}


def check_kind(name: str, value: Any, kind: type = int, nullable: bool = False) -> None:
    """Raises PretrainedError if the value is not of type `kind`; null is allowed if `nullable`."""
    allowed = (int, float) if kind is float else kind
    fits = isinstance(value, allowed) and (kind is bool or not isinstance(value, bool))
    if not fits and not (value is None and nullable):
        raise PretrainedError(f"config.json sets {name} to {json.dumps(value)}: this model needs {KINDS[kind]} there")


def check_count(name: str, value: Any) -> None:
    """Raises PretrainedError unless the value is a positive whole number."""
    check_kind(name, value)
    if value < 1:
        raise PretrainedError(f"config.json sets {name} to {value}: it must be at least 1")


def require(name: str, value: Any, allowed: Collection) -> None:
    """Raises PretrainedError unless `value`, or each item if it is a list, is allowed."""
    for item in value if isinstance(value, list) else [value]:
        if item not in allowed:
            choices = " or ".join(map(repr, allowed))
            raise PretrainedError(f"config.json sets {name} = {item!r}: this model knows {choices} only")


def write_config(published: Published, config: Any) -> dict[str, Any]:
    """The config.json from which `read_config` reads `config` again, without fields on tokenizer and weights.

    Raises PretrainedError for sizes that transformers refuses.
    """
    if published.heads_divide_width and config.d_model % config.n_heads:
        raise PretrainedError(
            f"transformers opens no {published.architecture} with hidden_size = {config.d_model} and "
            f"num_attention_heads = {config.n_heads}: n_heads must divide d_model (--model.n-heads), whatever head_dim "
            "is. This model can be trained and kept as a run, but not exported"
        )
    theirs = {"architectures": [published.architecture], "model_type": published.model_type}
    for name, their_name, default in published.fields:
        value = getattr(config, name)
        if value is not None or default is not None:  # transformers refuses an int for a float
            theirs[their_name] = float(value) if isinstance(default, float) and value is not None else value
    return theirs | published.write(config)
