"""Shapes with places: what layout.py computes and svg.py writes. Units are pixels at the size of a screen."""

from dataclasses import dataclass, field

SIZES = {"name": 20, "title": 14, "inner": 12, "fact": 11.5, "note": 12}
BOLD = ("name", "title", "inner")


@dataclass(frozen=True)
class Text:
    """A line of text: its left end, or its middle where it is centred, and the baseline."""

    x: float
    y: float
    text: str
    style: str
    centred: bool = False

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom."""
        width, size = text_width(self.text, self.style), SIZES[self.style]
        left = self.x - width / 2 if self.centred else self.x
        return left, self.y - 0.8 * size, left + width, self.y + 0.25 * size


@dataclass
class Box:
    """A rectangle with its texts and the boxes inside it. `number`: which part of the diagram it is, if any."""

    x: float
    y: float
    width: float
    height: float
    style: str
    number: int | None = None
    label: str = ""
    texts: list[Text] = field(default_factory=list)
    boxes: list["Box"] = field(default_factory=list)

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        return self.x, self.y, self.x + self.width, self.y + self.height

    @property
    def middle(self) -> float:
        return self.x + self.width / 2

    @property
    def bottom(self) -> float:
        return self.y + self.height


@dataclass(frozen=True)
class Line:
    """Straight pieces from point to point, with an arrow at the end."""

    points: tuple[tuple[float, float], ...]
    arrow: bool = True


@dataclass
class Scene:
    width: float
    height: float
    boxes: list[Box] = field(default_factory=list)
    texts: list[Text] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)


def text_width(text: str, style: str) -> float:
    """How wide a line is at most: the advances of DejaVu Sans, which is wider than the fonts of most systems."""
    widths = sum(
        NARROW if c in "iljI.,:;|!'()[]ft r·" else WIDE if c in "mwMW@%×√→≠" else CAPITAL if c.isupper() else 0.62
        for c in text
    )
    return widths * SIZES[style] * (1.1 if style in BOLD else 1.0)


NARROW, CAPITAL, WIDE = 0.42, 0.76, 0.98


def wrap(words: list[str], style: str, width: float, joint: str = " ") -> list[str]:
    """Words in lines no wider than `width`; a word that is wider than that has a line of its own, cut with dots."""
    lines: list[str] = []
    for word in words:
        longer = f"{lines[-1]}{joint}{word}" if lines else word
        if lines and text_width(longer, style) <= width:
            lines[-1] = longer
        elif text_width(word, style) > width and " " in word and joint != " ":
            lines += wrap(word.split(" "), style, width)
        else:
            lines.append(shorten(word, style, width))
    return lines


def shorten(word: str, style: str, width: float) -> str:
    if text_width(word, style) <= width:
        return word
    while word and text_width(word + "..", style) > width:
        word = word[:-1]
    return word + ".."
