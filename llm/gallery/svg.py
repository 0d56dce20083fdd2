"""Writes a Scene as SVG.

Colours are in style.css for the page. A picture for slides carries them inside, with the values of one theme in place
of the page's variables, since programs that draw SVG do not know variables.
"""

import re
from collections.abc import Mapping
from html import escape
from pathlib import Path

from llm.gallery.diagram import Diagram
from llm.gallery.layout import layout
from llm.gallery.scene import SIZES, Box, Line, Scene, Text

STYLE = Path(__file__).with_name("picture.css")


def draw(diagram: Diagram, marks: Mapping[int | str, str] | None = None, theme: str | None = None) -> str:
    """The picture of a model. `marks`: the number of a part -> `changed`, `new` or `resized`, its colour.

    With a `theme`, light or dark, the picture stands alone; without, it takes its colours from the page around it.
    """
    scene = layout(diagram)
    marks = marks or {}
    size = (
        f'viewBox="0 0 {num(scene.width)} {num(scene.height)}" width="{num(scene.width)}" height="{num(scene.height)}"'
    )
    label = escape(f"Architecture of {diagram.name}", quote=True)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" class="picture" role="group" aria-label="{label}" {size}>']
    if theme:
        parts.append(f"<style>{stylesheet(theme)}</style>")
        parts.append(f'<rect class="paper" width="{num(scene.width)}" height="{num(scene.height)}"/>')
    parts.append(body(scene, marks))
    return "\n".join([*parts, "</svg>\n"])


def body(scene: Scene, marks: Mapping[int | str, str]) -> str:
    frames = [box for box in scene.boxes if box.style in ("stack", "block")]
    rest = [box for box in scene.boxes if box.style not in ("stack", "block")]
    shapes = [frame_shape(box, marks) for box in frames]
    shapes += [line_shape(line) for line in scene.lines]
    shapes += [box_shape(box, marks) for box in rest]
    return "\n".join(shapes + [text_shape(text) for text in scene.texts])


def frame_shape(box: Box, marks: Mapping[int | str, str]) -> str:
    bar = f'<path class="bar" d="M{num(box.x)} {num(box.y + min(28, box.height))}h{num(box.width)}"/>'
    inside = f"{rect(box, 12)}{bar}{''.join(map(text_shape, box.texts))}"
    if box.number is None:
        return f'<g class="{box.style}">{inside}</g>'
    mark = marks.get(f"block {box.number}", "")
    label = escape(f"block: {box.label}{', ' + mark if mark else ''}", quote=True)
    button = f'data-block="{box.number}" tabindex="0" role="button" aria-label="{label}"'
    return f'<g class="{f"{box.style} {mark}".strip()}" {button}>{inside}</g>'


def box_shape(box: Box, marks: Mapping[int | str, str]) -> str:
    if box.style == "plus":
        x, y, r = box.middle, box.y + box.height / 2, box.height / 2
        cross = f"M{num(x - 6)} {num(y)}h12M{num(x)} {num(y - 6)}v12"
        return f'<g class="plus"><circle cx="{num(x)}" cy="{num(y)}" r="{num(r)}"/><path d="{cross}"/></g>'
    mark = marks.get(box.number, "")
    inside = "".join(map(text_shape, box.texts)) + "".join(box_shape(inner, marks) for inner in box.boxes)
    classes = f"{box.style} {mark}".strip()
    if box.number is None:
        return f'<g class="{classes}">{rect(box, box.height / 2)}{inside}</g>'
    label = escape(f"{box.label}{', ' + mark if mark else ''}", quote=True)
    opening = f'<g class="{classes}" data-part="{box.number}" tabindex="0" role="button" aria-label="{label}">'
    return f"{opening}{rect(box, 7)}{inside}</g>"


def rect(box: Box, radius: float) -> str:
    place = f'x="{num(box.x)}" y="{num(box.y)}" width="{num(box.width)}" height="{num(box.height)}"'
    return f'<rect {place} rx="{num(min(radius, box.height / 2))}"/>'


def line_shape(line: Line) -> str:
    points = "L".join(f"{num(x)} {num(y)}" for x, y in line.points)
    path = f'<path class="line" d="M{points}"/>'
    if not line.arrow:
        return path
    (x0, _), (x, y) = line.points[-2:]
    tip = f"M{num(x)} {num(y)}l-4 -7h8z" if x == x0 else f"M{num(x)} {num(y)}l-7 -4v8z"
    return f'{path}<path class="tip" d="{tip}"/>'


def text_shape(text: Text) -> str:
    anchor = ' text-anchor="middle"' if text.centred else ""
    return f'<text class="{text.style}" x="{num(text.x)}" y="{num(text.y)}"{anchor}>{escape(text.text)}</text>'


def num(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def stylesheet(theme: str) -> str:
    """picture.css with the colours of one theme in place of the variables."""
    text = STYLE.read_text(encoding="utf-8")
    blocks = dict(re.findall(r"\.(light|dark) \{(.*?)\}", text, re.S))
    colours = dict(re.findall(r"--([\w-]+): ([^;]+);", blocks[theme]))
    rules = text.split("/* shapes */")[1]
    rules = re.sub(r"var\(--([\w-]+)\)", lambda match: colours[match[1]], rules)
    return " ".join((rules + font_sizes()).split())


def font_sizes() -> str:
    """The sizes that the layout has measured with."""
    return "".join(f".picture .{style} {{ font-size: {size}px }}\n" for style, size in SIZES.items())
