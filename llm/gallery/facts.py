"""What stands beside a picture: costs against the context, and where everything is.

All costs come from llm/analysis/accounting.py, which the training scripts print from, too. They are for bf16 weights.
"""

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from llm.analysis import accounting
from llm.gallery.diagram import Part
from llm.gallery.docstrings import ROOT
from llm.models.transformer import Transformer

CONTEXTS = tuple(1024 * 2**k for k in range(11))
"""From 1 K to 1 M tokens."""


def costs(model: Transformer) -> dict[str, Any]:
    """Parameters, and for each of CONTEXTS the FLOPs a token and the bytes of the whole cache. None where the model has
    no such position."""
    flops, cache = [], []
    for context in CONTEXTS:
        try:
            cache.append(accounting.cache_bytes(model, context))
            flops.append(round(accounting.forward_flops(model, context)))
        except ValueError:  # learned positions end
            cache.append(None)
            flops.append(None)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "active": accounting.active_parameters(model),
        "flops": flops,
        "cache": cache,
        "printed": accounting.summary(model.float()).splitlines(),
    }


def part_flops(model: Transformer, part: Part) -> list[float] | None:
    """FLOPs a token of a box for each of CONTEXTS, all that is inside it included; one number where they are equal."""
    if not part.path or part.slot == "tok_embed":
        return None
    if part.slot == "head":
        return [2 * model.head_weight().numel()]
    modules = [module for module in model.get_submodule(part.path).modules()]
    found = [round(sum(accounting.own_flops(module, context) for module in modules)) for context in CONTEXTS]
    return found[:1] if len(set(found)) == 1 else found


def whereabouts(Model: type[Transformer], name: str) -> dict[str, Any]:
    """The files of a model: source, script, tests."""
    script = Path("train_scripts") / f"train_{name}.py"
    return {
        "source": Model.__module__.replace(".", "/") + ".py",
        "command": f"python {script}" if (ROOT / script).exists() else "",
        "tests": tests_of(Model),
    }


@lru_cache
def test_texts() -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "tests").glob("test_*.py"))}


def tests_of(Model: type[Transformer]) -> list[str]:
    """The test files that import the model by name; the contract of all models comes first."""
    imports = re.compile(rf"^from {re.escape(Model.__module__)} import", re.MULTILINE)
    found = [name for name, text in test_texts().items() if imports.search(text)]
    return [f"tests/{name}" for name in dict.fromkeys(["test_models.py", *found])]
