"""What differs between two pictures: which boxes of one the other does not have, has otherwise, or has in another size.

script.js does the same for the page; a test holds the two together.
"""

from llm.gallery.diagram import Diagram, Part


def marks(diagram: Diagram, other: Diagram) -> dict[int | str, str]:
    """Number of a part, or `block 0`, -> `new` (nothing stands there in `other`), `changed` (something else stands
    there) or `resized` (the same in other numbers). What is equal is left out."""
    theirs: dict[str, list[Part]] = {}
    for part in other.parts():
        theirs.setdefault(part.slot, []).append(part)
    found: dict[int | str, str] = {}
    for number, part in enumerate(diagram.parts()):
        if mark := compare(part, theirs.get(part.slot, [])):
            found[number] = mark
    wirings = [(block.title, block.nodes) for _, block in other.blocks()]
    for number, (_, block) in enumerate(diagram.blocks()):
        if (block.title, block.nodes) not in wirings:
            found[f"block {number}"] = "changed"
    return found


def compare(part: Part, others: list[Part]) -> str:
    if not others:
        return "new"
    if any((part.essence, part.facts) == (other.essence, other.facts) for other in others):
        return ""
    return "resized" if any(part.essence == other.essence for other in others) else "changed"
