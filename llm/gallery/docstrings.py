"""What a module says of itself: docstrings in this repository have a regular form, so nobody writes it down twice.

The first sentence is the idea, lines indented by four spaces are the equation, `arXiv 2104.09864` names a paper, and
`Blog: ..` the section of the blog.
"""

import calendar
import inspect
import operator
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
ARXIV = re.compile(r"(?:arXiv|\(|, )\s*(\d{4}\.\d{5})\b")
MONTHS = list(calendar.month_name)[1:]
DATE = re.compile(rf"(?:({'|'.join(MONTHS)}) )?\b((?:19|20)\d\d)\b(?!\.\d)")


@dataclass(frozen=True)
class About:
    """The docstring of a class or function, and of its file."""

    idea: str
    """First sentence of the file."""
    sentence: str
    """First sentence of the class or function; empty where it has none of its own."""
    equation: str
    papers: tuple[str, ...]
    """arXiv ids, those of the class first."""
    blog: str
    file: str
    line: int


def about(source: str) -> About:
    """`source` is `module:name`."""
    file, name = source.split(":")
    module = sys.modules[file]
    thing = operator.attrgetter(name)(module)
    own, whole = own_doc(thing), inspect.getdoc(module) or ""
    papers = dict.fromkeys(ARXIV.findall(own) + ARXIV.findall(whole))
    return About(
        idea=first_sentence(whole),
        sentence=first_sentence(own),
        equation=equation_of(name, own, whole),
        papers=tuple(papers),
        blog=blog_of(own) or blog_of(whole),
        file=str(Path(inspect.getsourcefile(thing)).relative_to(ROOT).as_posix()),
        line=inspect.getsourcelines(thing)[1],
    )


def own_doc(thing: Any) -> str:
    """The docstring of a class or function, not that of a base class; a dataclass without one gets none."""
    doc = vars(thing).get("__doc__") if isinstance(thing, type) else thing.__doc__
    return inspect.cleandoc(doc) if doc and not doc.startswith(f"{thing.__name__}(") else ""


def first_sentence(doc: str) -> str:
    """The text up to the first full stop that ends a sentence, or to the first empty line."""
    paragraph = " ".join(doc.split("\n\n")[0].split())
    match = re.search(r"(?<!\bal)(?<!\be\.g)(?<!\bi\.e)(?<! vs)\.(?= [A-Z]|$)", paragraph)
    return paragraph[: match.end()] if match else paragraph


def equation_of(name: str, own: str, whole: str) -> str:
    """The indented lines of the class; else those of the file that begin with its name; else all of the file's."""
    if indented(own):
        return "\n".join(indented(own))
    lines = indented(whole)
    named = [line for line in lines if re.match(rf"{name}\b", line)]
    return "\n".join(named or lines)


def indented(doc: str) -> list[str]:
    """Lines that are indented by four spaces, without those of a table of arguments or of code."""
    return [line[4:].rstrip() for line in doc.splitlines() if line.startswith("    ") and line.strip()]


def blog_of(doc: str) -> str:
    match = re.search(r"Blog:\s+(.+?)\.(?:\s|$)", " ".join(doc.split()))
    return match[1] if match else ""


def prefix(doc: str) -> str:
    """What a docstring calls its subject: the words before the first colon of `ALiBi: scores fall ..`, else nothing."""
    name = doc.partition(":")[0]
    return name if len(name) <= 32 and "\n" not in name and "." not in name else ""


def date_of(name: str, doc: str) -> tuple[int, int]:
    """Year and month (0: unknown) in which a model appeared, from its docstring: the date or the arXiv id behind the
    first mention of `name` (`qwen2.5`, `Gemma3`), else the first in the text."""
    text = " ".join(doc.split())
    pieces = name.split("-")
    whole = ["-".join(pieces[:n]) for n in range(len(pieces), 0, -1)]
    for spelling in (*whole, pieces[0].partition(".")[0]):
        loose = re.sub(r"-|(?<=[A-Za-z])(?=\d)|(?<=[a-z])(?=V\d)", "[ -]?", spelling)
        mention = re.compile(rf"\b{loose}\b(?=[ ,]*\(|, arXiv)", re.IGNORECASE)
        for found in mention.finditer(text):
            if date := first_date(text[found.end() : found.end() + 90]):
                return date
    return first_date(text) or (0, 0)


def first_date(text: str) -> tuple[int, int] | None:
    dates = [(m.start(), int(m[2]), MONTHS.index(m[1]) + 1 if m[1] else 0) for m in DATE.finditer(text)]
    dates += [(m.start(1), 2000 + int(m[1][:2]), int(m[1][2:4])) for m in ARXIV.finditer(text)]
    return min(dates)[1:] if dates else None
