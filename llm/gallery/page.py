"""The page: template.html with the styles, the script and the data inside it, one file that needs no network.

The data is JSON, deflated and in base64, which a browser unpacks in a moment; written out it would be several times as
large. `payload` is what the tests read.
"""

import base64
import dataclasses
import json
import zlib
from pathlib import Path
from typing import Any

from llm.gallery import catalog, facts
from llm.gallery.catalog import Entry
from llm.gallery.diagram import Diagram, equation
from llm.gallery.docstrings import about
from llm.gallery.results import results
from llm.gallery.sights import sights
from llm.gallery.svg import draw, font_sizes
from llm.models.transformer import Transformer

FOLDER = Path(__file__).parent
PAGE = FOLDER.parents[1] / "docs" / "gallery" / "index.html"
LIMIT = 600_000
"""Bytes that the page may have."""


def page() -> str:
    return fill(pack(payload()))


def fill(data: str) -> str:
    """The template with everything in its place."""
    text = read("template.html")
    styles = read("picture.css") + font_sizes() + read("style.css")
    for name, content in (("STYLE", styles), ("SCRIPT", read("script.js")), ("DATA", data)):
        text = text.replace(f"{{{{{name}}}}}", content)
    return text


def read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def pack(data: dict[str, Any]) -> str:
    raw = json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()
    return base64.b64encode(zlib.compress(raw, 9)).decode()


def unpack(html: str) -> dict[str, Any]:
    """The data of a page that was written before."""
    packed = html.split('<script type="text/plain" id="data">')[1].split("</script>")[0]
    return json.loads(zlib.decompress(base64.b64decode(packed)))


def payload() -> dict[str, Any]:
    """All that the page shows."""
    models, sources = [], {}
    for entry in catalog.entries().values():
        model = entry.build()
        diagram = catalog.picture(entry, model)
        found = [part.source for part in diagram.parts()] + [block.source for _, block in diagram.blocks()]
        sources |= dict.fromkeys(found)
        models.append(model_data(entry, model, diagram))
    described = {source: dataclasses.asdict(about(source)) for source in sources}
    return {"contexts": facts.CONTEXTS, "sources": described, "models": models}


def model_data(entry: Entry, model: Transformer, diagram: Diagram) -> dict[str, Any]:
    own = {} if entry.published else dataclasses.asdict(catalog.ancestry(entry.Model))
    return {
        "name": entry.name,
        "family": entry.family,
        "kind": entry.kind,
        "date": catalog.date(entry),
        "idea": catalog.idea(entry.Model),
        "fields": catalog.fields(diagram),
        "config": {name: value for name, value in dataclasses.asdict(entry.config).items() if name != "initialization"},
        "svg": draw(diagram),
        "outline": diagram.outline(),
        "parts": part_data(model, diagram),
        "blocks": [
            {"title": block.title, "equation": equation(block), "source": block.source, "times": times}
            for times, block in diagram.blocks()
        ],
        "sights": sights(model),
        "where": facts.whereabouts(entry.Model, entry.family),
        "results": results(entry.family),
        "costs": facts.costs(model),
        **own,
    }


def part_data(model: Transformer, diagram: Diagram) -> list[dict[str, Any]]:
    """Every box: what it is, its numbers, and in how many layers it stands."""
    layers = {id(part): times for times, block in diagram.blocks() for top in block.parts for part in top.walk()}
    return [
        {
            "slot": part.slot,
            "title": part.title,
            "facts": part.facts,
            "settings": part.settings,
            "matrices": part.matrices,
            "source": part.source,
            "parameters": part.parameters,
            "flops": facts.part_flops(model, part),
            "layers": layers.get(id(part), 0),
        }
        for part in diagram.parts()
    ]
