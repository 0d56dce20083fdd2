"""Every picture there is: the models of MODELS at their default sizes, and each published size of a case study."""

import dataclasses
import inspect
import sys
from dataclasses import dataclass

import torch

from llm.analysis.accounting import units
from llm.config import ModelConfig
from llm.gallery.describe import describe
from llm.gallery.diagram import Diagram, Part
from llm.gallery.docstrings import date_of, first_sentence, own_doc
from llm.hub.maps import PUBLISHED, SIZES
from llm.models import MODELS
from llm.models.transformer import Transformer

STEPS = ("embed", "unembed", "run_blocks", "loss", "generate", "decode")


@dataclass(frozen=True)
class Entry:
    """A model at a size. `family` is the model's name in MODELS; for a published size that of its model."""

    name: str
    family: str
    Model: type[Transformer]
    config: ModelConfig

    @property
    def published(self) -> bool:
        """Whether this is a published size."""
        return self.name != self.family

    @property
    def kind(self) -> str:
        """`published` size, `case study` at a size for training, or model of the `ladder`."""
        return "published" if self.published else "case study" if self.Model in PUBLISHED else "ladder"

    def build(self) -> Transformer:
        """The model without memory for its weights, in bf16."""
        with torch.device("meta"):
            return self.Model(self.config).to(torch.bfloat16)


def entries() -> dict[str, Entry]:
    """By name, in the order of MODELS, each published size after its model."""
    found = {}
    for family, Model in MODELS.items():
        found[family] = Entry(family, family, Model, Model.Config())
        for name, config in SIZES.get(Model, {}).items():
            found[name] = Entry(name, family, Model, config)
    return found


def picture(entry: Entry, model: Transformer | None = None) -> Diagram:
    model = model or entry.build()
    size = units(sum(p.numel() for p in model.parameters())).strip().replace("G", "B")
    subtitle = f"{size} parameters, {entry.config.n_layers} layers, context {entry.config.max_seq_len:,}"
    return describe(model, entry.name, subtitle)


def documentation(Model: type[Transformer]) -> str:
    return inspect.getdoc(sys.modules[Model.__module__]) or ""


def idea(Model: type[Transformer]) -> str:
    """The first sentence of the file, and that of the class where one file has several models."""
    several = [other for other in MODELS.values() if other.__module__ == Model.__module__][1:]
    own = first_sentence(own_doc(Model)) if several else ""
    return f"{first_sentence(documentation(Model))} {own}".strip().replace("`", "")


def date(entry: Entry) -> tuple[int, int]:
    """Year and month in which the model appeared."""
    name = entry.name if entry.published else entry.Model.__name__
    return date_of(name, documentation(entry.Model))


def fields(diagram: Diagram) -> dict[str, str]:
    """The columns of the table, read off the picture."""
    parts = diagram.parts()
    tops = [part for _, block in diagram.blocks() for part in block.parts]
    positions = [position_name(part) for part in parts if "position_encoding" in part.source]
    norms = [part.title for part in tops if part.kind == "norm"]
    masks = [part.title for part in parts if part.kind == "mask" and part.title != "Causal mask"]
    return {
        "position": join(positions) or "none",
        "norm": join([*(block.title for _, block in diagram.blocks()), *norms]),
        "mixer": join([*(kind_name(part) for part in tops if part.kind == "mixer"), *masks]),
        "ffn": join(ffn_name(part) for part in tops if part.kind == "ffn") or "none",
    }


def join(names) -> str:
    return ", ".join(dict.fromkeys(names))


def position_name(part: Part) -> str:
    if part.slot == "mixer":
        return next((fact for fact in part.facts if fact.endswith("attention")), part.title)
    scaling = next((fact.split()[1] for fact in part.facts if fact.startswith("scaling ")), "")
    return f"{part.title} with {scaling}" if scaling else part.title


def kind_name(part: Part) -> str:
    """The title, and the class where it says more; of mixers side by side the titles of all."""
    inner = [inner.title for inner in part.parts if inner.kind == "mixer"]
    if len(inner) > 1 and not part.matrices and not part.facts:
        return f"{part.title}: {' + '.join(inner)}"
    variant = next((fact for fact in part.facts if fact.endswith("attention")), "")
    qk_norm = any(inner.slot.endswith("k_norm") and "a_norm" not in inner.slot for inner in part.parts)
    extra = [variant.lower()] if variant else ["QK-norm"] if qk_norm else []
    return " with ".join([part.title, *extra])


def ffn_name(part: Part) -> str:
    counts = dict(fact.split(" ", 1) for inner in part.parts for fact in inner.facts if fact.count(" ") == 1)
    if "n_experts" not in counts:
        return part.title
    shared = ", shared expert" if any(inner.slot.endswith(".shared") for inner in part.parts) else ""
    return f"{part.title}, {counts['top_k']} of {counts['n_experts']}{shared}"


@dataclass(frozen=True)
class Ancestry:
    """What a class changes of the class that it extends. `lineage`: the classes above it, the nearest first."""

    lineage: tuple[str, ...]
    steps: tuple[str, ...]
    settings: tuple[str, ...]


def ancestry(Model: type[Transformer]) -> Ancestry:
    """The names of the classes above in MODELS (else of the classes), the steps that are overridden, the new fields."""
    parent = Model.__mro__[1]
    above = Model.__mro__[1 : Model.__mro__.index(Transformer) + 1]
    names = {cls: name for name, cls in MODELS.items()}
    own = [name for name, value in vars(Model).items() if inspect.isfunction(value) or isinstance(value, property)]
    steps = [name for name in own if name.startswith("make_") or name in STEPS]
    old = {field.name for field in dataclasses.fields(parent.Config)}
    new = [field.name for field in dataclasses.fields(Model.Config) if field.name not in old]
    lineage = tuple(names.get(cls, cls.__name__) for cls in above)
    return Ancestry(lineage, tuple(step for step in steps if step != "make_cache"), tuple(new))
