"""How a block is wired, read from the code that runs: its forward pass is traced with its submodules as whole steps.

torch.fx calls `forward` with stand-ins that write down what is done to them. So the residual path, the place of each
norm and whether two layers stand side by side are those of the code, and no block describes itself. `run_blocks` is
traced in the same way, with whole blocks as steps, to see which inputs each block is given.
"""

import inspect
import operator

import torch
from torch import fx, nn

from llm.gallery.diagram import Node
from llm.models.transformer import Transformer

SILENT = ("getattr", "getitem", "_assert_is_none", "size")
"""Operations that pass a tensor on, or only ask for its shape."""
HIDDEN = ("positions", "cache")
"""Arguments that every block has."""
ALONE = frozenset({"cache"})
"""What a block is not given where it reads only the stream: pictures show a whole text, which needs no cache."""


class Outside(fx.Tracer):
    """Follows the forward pass of one module, not those of its submodules."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


class Stream(nn.Module):
    """The blocks of a model as one forward pass, without a cache."""

    def __init__(self, model: Transformer):
        super().__init__()
        self.model = model

    def forward(self, x, positions, tokens):
        return self.model.run_blocks(x, positions, [None] * len(self.model.blocks), tokens)


def missing_inputs(model: Transformer) -> list[frozenset[str]]:
    """For each block, the arguments of its forward pass that are None in every call by `run_blocks`."""
    missing: dict[str, frozenset[str]] = {}
    try:
        steps = Outside().trace(Stream(model)).nodes
    except Exception:  # torch.fx raises many kinds
        steps = []
    for step in steps:
        if step.op == "call_module" and step.target.startswith("model.blocks."):
            call = inspect.signature(model.get_submodule(step.target.removeprefix("model.")).forward)
            call = call.bind(*step.args, **step.kwargs)
            call.apply_defaults()
            absent = frozenset(name for name, value in call.arguments.items() if value is None)
            missing[step.target] = missing.get(step.target, absent) & absent
    return [missing.get(f"model.blocks.{i}", ALONE) for i in range(len(model.blocks))]


TRACED: dict[tuple, tuple[Node, ...] | None] = {}
"""Blocks of one class with the same children and switches are wired alike: each kind is traced once."""


def trace(block: nn.Module, missing: frozenset[str] = ALONE) -> tuple[Node, ...] | None:
    """The steps from `x` to what the block returns, called with None for the arguments in `missing`; None where the
    forward pass depends on values."""
    switches = {name: value for name, value in vars(block).items() if isinstance(value, bool | int | str)}
    children = tuple((name, type(child)) for name, child in block.named_children())
    key = (type(block), children, tuple(switches.items()), missing)
    if key not in TRACED:
        try:
            TRACED[key] = follow(Outside().trace(block, concrete_args=dict.fromkeys(missing)))
        except Exception:  # torch.fx raises many kinds
            TRACED[key] = None
    return TRACED[key]


def follow(graph: fx.Graph) -> tuple[Node, ...]:
    nodes: list[Node] = []
    place: dict[fx.Node, int] = {}  # where the value of each step is, for those that have one
    for step in graph.nodes:
        inputs = tuple(dict.fromkeys(place[i] for i in step.all_input_nodes if i in place))
        name = getattr(step.target, "__name__", str(step.target))
        if step.op == "output":
            return trim(nodes, inputs[0])
        if step.op == "placeholder":
            if not name.startswith(HIDDEN):
                place[step] = add(nodes, Node(name if nodes else "x"))
        elif name in SILENT or step.op == "get_attr":
            if inputs:
                place[step] = inputs[0]
        elif step.target in (operator.add, torch.add, operator.iadd):
            place[step] = add(nodes, Node("+", inputs)) if len(inputs) > 1 else inputs[0]
        else:
            place[step] = add(nodes, Node(name, inputs))
    return None


def add(nodes: list[Node], node: Node) -> int:
    nodes.append(node)
    return len(nodes) - 1


def trim(nodes: list[Node], last: int) -> tuple[Node, ...]:
    """Only the nodes that the result depends on; `(x + a) + b` becomes one addition where nobody else reads `x + a`."""
    readers = [[j for j, node in enumerate(nodes) if i in node.inputs] for i in range(len(nodes))]

    def merged(i: int) -> tuple[int, ...]:
        if nodes[i].label == "+" and len(readers[i]) == 1 and nodes[readers[i][0]].label == "+":
            return tuple(k for j in nodes[i].inputs for k in merged(j))
        return (i,)

    inputs = [tuple(k for j in node.inputs for k in (merged(j) if node.label == "+" else (j,))) for node in nodes]
    used, waiting = set(), [last]
    while waiting:
        i = waiting.pop()
        used.add(i)
        waiting += [j for j in inputs[i] if j not in used]
    order = sorted(used)
    return tuple(Node(nodes[i].label, tuple(order.index(j) for j in inputs[i])) for i in order)


def chain(slots: list[str]) -> tuple[Node, ...]:
    """The parts one after the other: what is drawn where the wiring is not known."""
    return (Node("x"), *(Node(slot, (i,)) for i, slot in enumerate(slots)))
