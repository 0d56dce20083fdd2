"""What stands beside a picture: costs against the context, masks, the speeds of RoPE, and where everything is.

All costs come from llm/analysis/accounting.py, which the training scripts print from, too. They are for bf16 weights.
"""

import math
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llm.analysis import accounting
from llm.gallery.diagram import Part
from llm.gallery.docstrings import ROOT
from llm.models.transformer import Transformer
from llm.modules.masks import Mask, visibility
from llm.modules.position_encoding.rope import RoPE, inverse_frequencies

CONTEXTS = tuple(1024 * 2**k for k in range(11))
"""From 1 K to 1 M tokens."""
CELLS = 48
"""Rows and columns of a drawn mask."""


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


def mask_picture(mask: Mask, longest: int) -> dict[str, Any]:
    """The mask over a text that is long enough to show its shape: CELLS rows of digits, 0 hidden to 9 visible.

    `length` is that of the text. Where a cell stands for many pairs of tokens, its digit is the share of visible ones.
    """
    length = max(CELLS, min(longest, 2 * mask.reach if mask.reach < math.inf else longest))
    step = max(1, round(length / CELLS))
    inside = min(step, 8)  # positions looked at in each cell, by row and column
    offsets = torch.arange(inside) * step // inside
    positions = (torch.arange(CELLS)[:, None] * step + offsets).flatten()
    shown = visibility(mask, positions, positions).float().unflatten(0, (CELLS, inside)).unflatten(2, (CELLS, inside))
    digits = (shown.mean((1, 3)) * 9).ceil().int().tolist()
    return {"length": CELLS * step, "rows": ["".join(map(str, row)) for row in digits]}


def bias_curves(bias: Any, n_distances: int = 256) -> list[list[float]] | None:
    """What a fixed bias adds to the scores by distance, a list for each head; None where it is learned."""
    if isinstance(bias, nn.Module) or bias is None:
        return None
    curves = bias(torch.tensor([n_distances - 1]), torch.arange(n_distances))[:, 0].flip(-1)
    return [[round(value, 3) for value in head[::16]] for head in curves.tolist()]


def rope_wavelengths(rope: RoPE, context: int) -> dict[str, Any]:
    """Tokens in which each pair of channels makes a full turn, without and with the scaling."""
    plain = inverse_frequencies(rope.rotary_dim, rope.theta)
    scaled = rope.scaling(rope.rotary_dim, rope.theta, torch.arange(context))[0] if rope.scaling else None
    turns = [
        None if f is None else [float(f"{2 * math.pi / value:.3g}") for value in f.tolist()] for f in (plain, scaled)
    ]
    return {"plain": turns[0], "scaled": turns[1], "context": context}


def sights(model: Transformer) -> dict[str, Any]:
    """What the tokens of a model see: each mask once, the bias of the scores, and each rotation once."""
    longest = model.config.max_seq_len
    masks, ropes, biases = {}, {}, {}
    for module in model.modules():
        if isinstance(mask := getattr(module, "mask", None), Mask):
            masks.setdefault(repr(mask), mask)
        if isinstance(module, RoPE):
            ropes.setdefault((module.theta, module.rotary_dim, repr(module.scaling)), module)
        if callable(bias := getattr(module, "score_bias", None)) and not isinstance(bias, nn.Module):
            biases.setdefault(repr(bias), bias)
    return {
        "masks": [{"name": name, **mask_picture(mask, longest)} for name, mask in list(masks.items())[:4]],
        "ropes": [{"theta": key[0], **rope_wavelengths(rope, longest)} for key, rope in ropes.items()],
        "biases": [curves for bias in biases.values() if (curves := bias_curves(bias))],
    }


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


def results(name: str) -> list[dict[str, str]]:
    """The rows about a model in the tables of docs/case_studies.md and docs/results/: the header, and its cells."""
    pages = [ROOT / "docs" / "case_studies.md", *sorted((ROOT / "docs" / "results").glob("**/*.md"))]
    return [row for page in pages if page.exists() for row in rows_of(page, name)]


def rows_of(page: Path, name: str) -> list[dict[str, str]]:
    found, header = [], []
    for line in page.read_text(encoding="utf-8").splitlines():
        cells = [plain(cell) for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []
        if not cells:
            header = []
        elif not header:
            header = cells
        elif cells[0].split(",")[0] == name and len(cells) == len(header):
            found.append({"page": page.relative_to(ROOT).as_posix(), **dict(zip(header, cells, strict=True))})
    return found


def plain(cell: str) -> str:
    """A cell of a Markdown table without its link and its bold type."""
    return re.sub(r"\[(.+?)\]\(.+?\)", r"\1", cell).replace("*", "").replace("`", "").strip()
