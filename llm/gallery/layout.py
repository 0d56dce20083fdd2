"""Where everything stands: a Diagram becomes a Scene, by counting and measuring only.

The picture is one column, read from top to bottom. Inside a block each step has a rank, the longest way to it from the
block's input; steps of one rank stand side by side, as in a parallel block. An edge to the next rank is drawn straight;
a longer one, such as the residual path, leaves into a lane on the left.
"""

from dataclasses import dataclass
from itertools import groupby

from llm.gallery.diagram import Block, Diagram, Node, Part, Stack
from llm.gallery.scene import Box, Line, Scene, Text, shorten, text_width, wrap

BOX, MARGIN, PADDING, GAP, LANE = 300, 16, 14, 25, 16
BAR, PLUS, PILL = 28, 24, 84


def layout(diagram: Diagram) -> Scene:
    return Column(diagram).place()


class Column:
    """The pen that moves down the page: `y` is where the next box may begin, `tip` where the stream ended."""

    def __init__(self, diagram: Diagram):
        self.diagram, self.scene = diagram, Scene(0, 0)
        self.numbers = {id(part): number for number, part in enumerate(diagram.parts())}
        graphs = [Graph(block) for _, block in diagram.blocks()]
        self.columns = max(graph.width for graph in graphs)
        self.lanes = max(max(graph.lanes.values(), default=-1) + 1 for graph in graphs)
        self.deep = any(stack.repeat > 1 and len(stack.blocks) > 1 for stack in diagram.stacks)
        self.left = MARGIN + PADDING * (2 if self.deep else 1) + LANE * self.lanes
        self.centre = self.left + self.columns / 2
        right = self.left + self.columns + PADDING * (2 if self.deep else 1) + MARGIN
        self.scene.width = max(right, 2 * self.centre - right)
        self.y = MARGIN
        self.tip: float | None = None
        self.drawn: list[Block] = []

    def place(self) -> Scene:
        self.heading()
        self.terminal("Tokens")
        for part in self.diagram.before:
            self.follow(self.box(part, self.centre - BOX / 2, self.y, BOX))
        for stack in self.diagram.stacks:
            self.stack(stack)
        for part in self.diagram.after:
            self.follow(self.box(part, self.centre - BOX / 2, self.y, BOX))
        self.terminal("Logits")
        self.training_only()
        self.scene.height = self.y - GAP + MARGIN
        return self.scene

    def heading(self) -> None:
        width = self.scene.width - 2 * MARGIN
        lines = [(line, "name", 24) for line in wrap([self.diagram.name], "name", width)]
        for text in (self.diagram.subtitle, self.diagram.note):
            lines += [(line, "note", 17) for line in wrap(text.split(), "note", width)]
        for line, style, step in lines:
            self.scene.texts.append(Text(MARGIN, self.y + 0.75 * step, line, style))
            self.y += step
        self.y += PADDING

    def terminal(self, text: str) -> None:
        """The two ends of the stream."""
        box = Box(self.centre - PILL / 2, self.y, PILL, PLUS, "end")
        box.texts.append(Text(self.centre, self.y + 16, text, "fact", centred=True))
        self.follow(box)

    def follow(self, box: Box) -> None:
        """The stream goes on into `box` and leaves below it."""
        self.scene.boxes.append(box)
        if self.tip is not None:
            self.scene.lines.append(Line(((self.centre, self.tip), (self.centre, box.y))))
        self.tip, self.y = box.bottom, box.bottom + GAP

    def box(self, part: Part, x: float, y: float, width: float, style: str = "title") -> Box:
        """A part with its facts, and its own parts in rows below them."""
        box = Box(x, y, width, 0, f"part {part.kind}", self.numbers.get(id(part)), spoken(part))
        pad, step = (12, 18) if style == "title" else (8, 15)
        bottom = y + (pad - 2 if style == "title" else 5)
        for line in wrap(part.title.split(), style, width - 2 * pad):
            box.texts.append(Text(x + pad, bottom + 0.8 * step, line, style))
            bottom += step
        if style == "inner" and part.path:  # its name in the code, at the right end
            name = part.slot.rpartition(".")[2]
            space = width - 2 * pad - text_width(box.texts[-1].text, style) - 8
            if text_width(name, "fact") <= space and name.lower() != part.title.lower():
                box.texts.append(Text(x + width - pad - text_width(name, "fact"), bottom - 0.2 * step, name, "fact"))
        for line in wrap(list(part.facts), "fact", width - 2 * pad, joint=" · "):
            box.texts.append(Text(x + pad, bottom + 12, line, "fact"))
            bottom += 15
        if part.parts:
            bottom = self.rows(box, part.parts, x + pad, bottom + 6, width - 2 * pad)
        box.height = bottom + (pad - 4 if style == "title" else 5) - y
        return box

    def rows(self, box: Box, parts: tuple[Part, ...], x: float, y: float, width: float) -> float:
        """Inner boxes side by side as long as they fit; each row fills the width. Returns where they end."""
        rows: list[list[tuple[Part, float]]] = [[]]
        for part in parts:
            wide = width if part.parts else min(width, inner_width(part))
            if rows[-1] and sum(w + 6 for _, w in rows[-1]) + wide > width:
                rows.append([])
            rows[-1].append((part, wide))
        for row in rows:
            spare, left, made = (width - sum(w for _, w in row) - 6 * (len(row) - 1)) / len(row), x, []
            for part, wide in row:
                made.append(self.box(part, left, y, wide + spare, "inner"))
                left += wide + spare + 6
            tallest = max(inner.height for inner in made)
            for inner in made:
                inner.height = tallest
            box.boxes += made
            y += tallest + 6
        return y - 2

    def stack(self, stack: Stack) -> None:
        """The blocks of a stack, in a frame of their own where several of them repeat together."""
        framed = stack.repeat > 1 and len(stack.blocks) > 1
        if framed:
            ratio = " : ".join(str(n) for n, _ in stack.blocks)
            frame = self.frame(f"{stack.repeat} × ({ratio})", "stack", MARGIN)
            self.tip, self.y = frame.y + BAR, frame.y + BAR + GAP
        for n, block in stack.blocks:
            self.block(n if framed else n * stack.repeat, block)
        if framed:
            self.close(frame)

    def frame(self, title: str, style: str, x: float, short: str = "") -> Box:
        """An open frame with a bar for its title, or `short` where the title is too long; the stream enters the bar."""
        right = self.left + self.columns + (PADDING if x > MARGIN or not self.deep else 2 * PADDING)
        frame = Box(x, self.y, right - x, 0, style, label=title)
        line = shorten(title, "title", frame.width - 2 * PADDING)
        if line != title and short:
            line = shorten(short, "title", frame.width - 2 * PADDING)
        frame.texts.append(Text(x + PADDING, self.y + 19, line, "title"))
        self.scene.boxes.append(frame)
        self.scene.lines.append(Line(((self.centre, self.tip), (self.centre, frame.y))))
        return frame

    def close(self, frame: Box) -> None:
        """The stream leaves the frame through its lower edge."""
        frame.height = self.y - GAP + PADDING - frame.y
        self.scene.lines.append(Line(((self.centre, self.tip), (self.centre, frame.bottom)), arrow=False))
        self.tip, self.y = frame.bottom, frame.bottom + GAP

    def block(self, times: int, block: Block) -> None:
        others = [other for _, other in self.diagram.blocks() if other != block]
        title = f"{times} × {' · '.join([block.title, *distinction(block, others)])}"
        short = f"{times} × {(distinction(block, others) or [block.title])[0]}"
        x = MARGIN + (PADDING if self.deep else 0)
        if block in self.drawn:
            frame = self.frame(f"{short}, as above", "block", x, f"{short}, above")
            frame.height = BAR
            self.tip, self.y = frame.bottom, frame.bottom + GAP
            return
        frame = self.frame(title, "block", x, short)
        frame.number = len(self.drawn)
        self.drawn.append(block)
        self.y = frame.y + BAR + GAP
        self.graph(Graph(block), frame.y + BAR)
        self.close(frame)

    def graph(self, graph: "Graph", top: float) -> None:
        """The steps of a block, rank by rank, and the edges between them."""
        places: dict[int, Box] = {0: Box(self.centre, top, 0, 0, "")}
        for rank in graph.by_rank[1:]:
            beside = graph.beside.intersection(rank)
            width = BOX if beside else sum(graph.widths[i] for i in rank) + GAP * (len(rank) - 1)
            x = self.centre - width / 2
            for i in rank:
                places[i] = self.step(graph, i, x, self.y)
                x += BOX - PILL if beside else graph.widths[i] + GAP  # the stream passes between two inputs
            tallest = max(places[i].height for i in rank)
            for i in rank:  # in the middle of its row
                if places[i].height < tallest and places[i].style in ("plus", "pill"):
                    places[i] = self.step(graph, i, places[i].x, self.y + (tallest - places[i].height) / 2)
            self.scene.boxes += [places[i] for i in rank]
            self.y += tallest + GAP
        for v, node in enumerate(graph.block.nodes):
            for u in node.inputs:
                self.edge(graph, u, v, places)
        self.tip = places[len(graph.block.nodes) - 1].bottom

    def step(self, graph: "Graph", i: int, x: float, y: float) -> Box:
        label = graph.block.nodes[i].label
        if part := graph.block.part(label):
            return self.box(part, x, y, BOX)
        style, width = ("plus", PLUS) if label == "+" else ("pill", PILL)
        box = Box(x, y, width, PLUS, style, label="addition" if label == "+" else label)
        box.texts += (
            [] if label == "+" else [Text(x + width / 2, y + 16, wrap([label], "fact", width - 6)[0], "fact", True)]
        )
        return box

    def edge(self, graph: "Graph", u: int, v: int, places: dict[int, Box]) -> None:
        start, end = places[u], places[v]
        if (u, v) not in graph.lanes:
            if u in graph.beside and end.x < start.middle < end.x + end.width:
                self.scene.lines.append(Line(((start.middle, start.bottom), (start.middle, end.y))))
                return
            row = [places[i] for i in graph.by_rank[graph.ranks[v]]]
            middle = min(box.y for box in row) - GAP / 2
            bend = ((start.middle, middle), (end.middle, middle)) if abs(start.middle - end.middle) > 1 else ()
            self.scene.lines.append(Line(((start.middle, start.bottom), *bend, (end.middle, end.y))))
            return
        lane = self.left - PADDING / 2 - LANE * (graph.lanes[u, v] + 0.5)
        way = [(start.middle, start.bottom), (start.middle, start.bottom + 9), (lane, start.bottom + 9)]
        if len(graph.by_rank[graph.ranks[v]]) == 1:
            way += [(lane, end.y + end.height / 2), (end.x, end.y + end.height / 2)]
        else:
            way += [(lane, end.y - 9), (end.middle, end.y - 9), (end.middle, end.y)]
        self.scene.lines.append(Line(tuple(way)))

    def training_only(self) -> None:
        for part in self.diagram.training_only:
            text = "In training only:"
            self.scene.texts.append(Text(self.centre - BOX / 2, self.y, text, "note"))
            box = self.box(part, self.centre - BOX / 2, self.y + 10, BOX)
            self.scene.boxes.append(box)
            self.y = box.bottom + GAP


@dataclass
class Graph:
    """The steps of a block by rank, their widths, and the lane of each edge that passes over a step of the stream.

    Inputs that come from `beside` the stream have a rank of their own, so that they move nothing else.
    """

    block: Block

    def __post_init__(self):
        nodes = self.block.nodes
        self.beside = {i for i, node in enumerate(nodes) if i and not node.inputs}
        self.ranks = ranks(nodes)
        order = sorted(range(len(nodes)), key=lambda i: (self.ranks[i], i))
        self.by_rank = [list(group) for _, group in groupby(order, key=lambda i: self.ranks[i])]
        self.widths = [self.node_width(node) for node in nodes]
        self.width = max(sum(self.widths[i] for i in row) + GAP * (len(row) - 1) for row in self.by_rank)
        edges = [(u, v) for v, node in enumerate(nodes) for u in node.inputs]
        solid = {self.ranks[i] for i in range(len(nodes)) if i not in self.beside}
        long = [(u, v) for u, v in edges if solid.intersection(range(self.ranks[u] + 1, self.ranks[v]))]
        self.lanes: dict[tuple[int, int], int] = {}
        for u, v in sorted(long, key=lambda edge: self.ranks[edge[1]] - self.ranks[edge[0]]):
            taken = {lane for edge, lane in self.lanes.items() if self.overlap(edge, (u, v))}
            self.lanes[u, v] = next(lane for lane in range(len(long)) if lane not in taken)

    def node_width(self, node: Node) -> float:
        return BOX if self.block.part(node.label) else PLUS if node.label == "+" else PILL

    def overlap(self, a: tuple[int, int], b: tuple[int, int]) -> bool:
        return self.ranks[a[0]] < self.ranks[b[1]] and self.ranks[b[0]] < self.ranks[a[1]]


def ranks(nodes: tuple[Node, ...]) -> list[int]:
    """The longest way to each node, counted in twos; an input beside the stream stands between, above its reader."""
    found: list[int] = []
    for node in nodes:
        found.append(max((found[i] + 2 for i in node.inputs), default=0))
    for i, node in enumerate(nodes):
        if i and not node.inputs:
            found[i] = max(1, min(found[j] for j, other in enumerate(nodes) if i in other.inputs) - 1)
    for i, node in enumerate(nodes):  # what only such inputs reach begins below them
        found[i] = max([found[i], *(found[j] + 1 for j in node.inputs)])
    used = sorted(set(found))
    return [used.index(rank) for rank in found]


def distinction(block: Block, others: list[Block]) -> list[str]:
    """What tells a block from the model's other blocks: the title of a part that none of them has in that place, or an
    input that they do not read."""
    if not others:
        return []
    theirs = {(part.slot, part.title) for other in others for top in other.parts for part in top.walk()}
    own = [part for top in block.parts for part in top.walk() if (part.slot, part.title) not in theirs]
    own = [part for part in own if "," not in part.slot]  # not what only has other neighbours of its kind
    inputs = {node.label for other in others for node in other.nodes}
    read = [node.label for node in block.nodes if not node.inputs and node.label not in inputs]
    return [min(own, key=lambda part: part.slot.count(".")).title] if own else read[:1]


def inner_width(part: Part) -> float:
    name = text_width(part.slot.rpartition(".")[2], "fact") + 10 if part.path else 0
    return 17 + max(text_width(part.title, "inner") + name, text_width(" · ".join(part.facts), "fact"))


def spoken(part: Part) -> str:
    """What a screen reader says for a box."""
    return ", ".join([f"{part.slot.rpartition('.')[2]}: {part.title}", *part.facts])
