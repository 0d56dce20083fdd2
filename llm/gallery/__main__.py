"""Pictures of architectures, drawn from the code.

python -m llm.gallery                                              # writes docs/gallery/index.html
python -m llm.gallery qwen3 --vs llama --out qwen3.svg             # one picture, coloured where it differs
python -m llm.gallery qwen3 --size qwen3-8b --out qwen3.png        # at a published size
python -m llm.gallery qwen3                                        # in words
"""

import difflib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from llm.console import console
from llm.files import write_atomically
from llm.gallery import catalog, page
from llm.gallery.compare import marks
from llm.gallery.png import as_png
from llm.gallery.svg import draw


@dataclass(frozen=True)
class Arguments:
    """Without a model, write the page docs/gallery/index.html; with one, its picture."""

    model: Annotated[str | None, tyro.conf.Positional] = None
    """A name of the page: a model, such as qwen3, or a published size, such as qwen3-8b."""
    size: str | None = None
    """A published size of the model."""
    vs: str = "baseline"
    """What the picture is compared with: what differs is coloured."""
    out: Path | None = None
    """File to write, .svg or .png; for the page, .html. Without it, the picture is printed in words."""
    theme: Literal["light", "dark"] = "light"
    """Colours of the picture."""


@console()
def main(arguments: list[str] | None = None) -> None:
    flags = tyro.cli(Arguments, args=arguments, prog="python -m llm.gallery")
    try:
        if flags.model is None:
            write_page(flags.out or page.PAGE)
        else:
            write_picture(flags)
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")


def write_page(out: Path) -> None:
    if out.suffix != ".html":
        raise ValueError(f"--out {out} must end in .html: without a model's name, this writes the page of all models")
    text = page.page().encode()
    save(out, text)
    print(f"{out}: {len(text):,} bytes, {len(catalog.entries())} pictures")


def write_picture(flags: Arguments) -> None:
    diagram, other = catalog.picture(chosen(flags)), catalog.picture(find(flags.vs))
    if flags.out is None:
        print(diagram.outline())
        return
    if flags.out.suffix not in (".svg", ".png"):
        raise ValueError(f"--out {flags.out} must end in .svg or .png")
    svg = draw(diagram, marks(diagram, other), flags.theme)
    save(flags.out, svg.encode() if flags.out.suffix == ".svg" else as_png(svg))
    print(flags.out)


def save(out: Path, content: bytes) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, content)


def chosen(flags: Arguments) -> catalog.Entry:
    """The model, or the size of it that `--size` names."""
    entry = find(flags.model)
    if flags.size is None:
        return entry
    sizes = {name: size for name, size in catalog.entries().items() if size.family == entry.family and size.published}
    if flags.size not in sizes:
        there = f"there are {', '.join(sizes)}" if sizes else "it is published in none"
        raise ValueError(f"{entry.family} has no size {flags.size!r}; {there} (--size)")
    return sizes[flags.size]


def find(name: str) -> catalog.Entry:
    """Raises ValueError, with names that are close, for one that no picture has."""
    entries = catalog.entries()
    if name not in entries:
        close = difflib.get_close_matches(name, entries, n=4) or list(entries)
        raise ValueError(f"no picture is called {name!r}; there are {', '.join(close)}")
    return entries[name]


if __name__ == "__main__":
    main()
