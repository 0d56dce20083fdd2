"""What a picture of a model shows, as plain values: describe.py makes them, layout.py and svg.py draw them.

A `Diagram` is a column: the embedding, then stacks of blocks, then the final norm and the head. Blocks that are alike
are drawn once, with their number beside them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Part:
    """One box: a module, a mask or a function, with the parts that it holds."""

    slot: str
    """Where it stands: `mixer`, `mixer.rope`, `ffn.router`. Two models are compared slot by slot."""
    kind: str
    """embedding, position, norm, mixer, mask, ffn, head or other: its colour."""
    title: str
    facts: tuple[str, ...] = ()
    """What its attributes say, such as `n_heads 32`."""
    settings: tuple[str, ...] = ()
    """Attributes that are not worth a place in the picture."""
    matrices: tuple[str, ...] = ()
    """Its own weights and their shapes."""
    parts: tuple["Part", ...] = ()
    path: str = field(default="", compare=False)
    """Its name in the model; empty for what is no module. Blocks that are alike keep the path of the first."""
    source: str = field(default="", compare=False)
    """`module:name` of its class or function."""
    parameters: int = field(default=0, compare=False)

    @property
    def essence(self) -> tuple:
        """What it is, without its sizes."""
        return self.title, tuple(fact for fact in self.facts if not is_size(fact))

    def walk(self) -> Iterator["Part"]:
        yield self
        for part in self.parts:
            yield from part.walk()


def is_size(fact: str) -> bool:
    """Whether a fact is a number, such as `n_heads 32` or `kv_split 512 + 64`."""
    return any(word[0].isdigit() for word in fact.split()[1:])


@dataclass(frozen=True)
class Node:
    """A step of a block's forward pass, on the nodes before it, by their place in `Block.nodes`."""

    label: str
    """`x` for the stream that comes in, `+` for an addition, the slot of a part, or the name of another operation."""
    inputs: tuple[int, ...] = ()


@dataclass(frozen=True)
class Block:
    """Parts and how they are wired. The last node is what the block returns."""

    title: str
    parts: tuple[Part, ...]
    nodes: tuple[Node, ...]
    source: str = field(default="", compare=False)
    path: str = field(default="", compare=False)
    traced: bool = True
    """False where the forward pass could not be followed: the parts then stand in the order of their definition."""

    def ordered(self) -> list[Part]:
        """The parts in the order in which the stream meets them."""
        met = [node.label for node in self.nodes]
        return sorted(self.parts, key=lambda part: met.index(part.slot) if part.slot in met else len(met))

    def part(self, label: str) -> Part | None:
        return next((part for part in self.parts if part.slot == label), None)


@dataclass(frozen=True)
class Stack:
    """`repeat` times the `blocks`, each with how often it stands in a row: 4 x (5 local, 1 global)."""

    repeat: int
    blocks: tuple[tuple[int, Block], ...]


@dataclass(frozen=True)
class Diagram:
    """A whole model, from the tokens to the logits."""

    name: str
    subtitle: str
    before: tuple[Part, ...]
    stacks: tuple[Stack, ...]
    after: tuple[Part, ...]
    training_only: tuple[Part, ...] = ()
    note: str = ""
    """How the blocks are run, where the model does not simply run them in turn."""

    def blocks(self) -> list[tuple[int, Block]]:
        """Each kind of block, drawn where it occurs first, and how often the model has it."""
        found: list[tuple[int, Block]] = [
            (stack.repeat * n, block) for stack in self.stacks for n, block in stack.blocks
        ]
        kinds = list(dict.fromkeys(block for _, block in found))
        return [(sum(n for n, block in found if block == kind), kind) for kind in kinds]

    def parts(self) -> list[Part]:
        """Every box in the order of drawing: the numbers by which a page finds them."""
        blocks = [part for _, block in self.blocks() for part in block.ordered()]
        return [part for top in (*self.before, *blocks, *self.after, *self.training_only) for part in top.walk()]

    def outline(self) -> str:
        """The picture in words, one line a box: for a terminal, a screen reader and the tests."""
        lines = [line for part in self.before for line in outlined(part, 0)]
        for stack in self.stacks:
            deeper = int(stack.repeat > 1 and len(stack.blocks) > 1)
            lines += [f"{stack.repeat} x"] * deeper
            for n, block in stack.blocks:
                times = n if deeper else n * stack.repeat
                lines.append("  " * deeper + f"{times} x {block.title}: {equation(block)}")
                lines += [line for part in block.ordered() for line in outlined(part, deeper + 1)]
        lines += [line for part in self.after for line in outlined(part, 0)]
        lines += [
            f"{line}{'' if line[0] == ' ' else ' (training only)'}"
            for p in self.training_only
            for line in outlined(p, 0)
        ]
        return "\n".join(lines)


def outlined(part: Part, depth: int) -> list[str]:
    facts = f" ({', '.join(part.facts)})" if part.facts else ""
    lines = ["  " * depth + f"{part.slot.rpartition('.')[2]}: {part.title}{facts}"]
    return lines + [line for inner in part.parts for line in outlined(inner, depth + 1)]


def equation(block: Block) -> str:
    """The wiring as assignments: `x = x + mixer(norm(x)); x = x + ffn(norm(x))`.

    A value that is read twice gets a name: x, or h where x is still needed.
    """
    reads = [[j for j, node in enumerate(block.nodes) if i in node.inputs] for i in range(len(block.nodes))]
    texts, statements, stream = [], [], 0
    for i, node in enumerate(block.nodes):
        inputs = [texts[j] for j in node.inputs]
        text = (
            " + ".join(inputs) if node.label == "+" else f"{node.label}({', '.join(inputs)})" if inputs else node.label
        )
        is_last = i == len(block.nodes) - 1
        if inputs and (len(reads[i]) > 1 or is_last):
            name = "x" if is_last or max(reads[stream]) <= i else "h"
            stream = i if name == "x" else stream
            statements.append(f"{name} = {text}")
            text = name
        texts.append(text)
    return "; ".join(statements)
