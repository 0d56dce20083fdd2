"""Imports run one way, without circles; and only three places ask which device, dtype or compiler there is."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from training import ROOT

LAYERS = (
    ("llm.config", "llm.console", "llm.files"),
    ("llm.modules",),
    ("llm.models",),
    ("llm.data", "llm.hub", "llm.analysis.accounting"),
    ("llm.generate.sampling", "llm.generate.text", "llm.generate.compile"),
    ("llm.training",),
    # commands
    ("llm.generate", "llm.analysis", "llm.compare", "llm.evaluate", "llm.gallery", "llm.pretrained"),
    ("llm.plot_initialization",),
)
"""A module may import from its own layer and from those above it here. The longest name that fits counts."""
MAY_ASK = ("llm.modules.kernels", "llm.training.device", "llm.generate.compile")
QUESTION = re.compile(
    r"torch\.(cuda|mps|xpu|cpu|backends|compile|compiler|autocast|amp|_dynamo|_inductor|_functorch)\b|"
    r"(.*\.)?device\.type|.*\.(is_(cuda|cpu|mps|xpu|meta)|is_(autocast_enabled|compiling|dynamo_compiling))|"
    r".*\.(get_device_(capability|properties|name)|get_autocast_\w+)"
)
PATHS = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in sorted((ROOT / "llm").rglob("*.py"))}
MODULES = {name.removesuffix(".__init__"): path for name, path in PATHS.items()}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, also within functions and for type checks only."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names = {f"{node.module}.{name.name}" for name in node.names}
            submodules = names & MODULES.keys()
            found |= submodules | ({node.module} if names - submodules else set())
    return found


GRAPH = {name: imports(path) & MODULES.keys() for name, path in MODULES.items()}


def layer(module: str) -> int:
    """The number of a module's layer."""
    fitting = {name: i for i, names in enumerate(LAYERS) for name in names if f"{module}.".startswith(f"{name}.")}
    assert fitting, f"{module} has no layer: give it one in {Path(__file__).name}"
    return fitting[max(fitting, key=len)]


@pytest.mark.parametrize("module", [name for name in MODULES if name != "llm"])
def test_a_module_imports_from_its_own_layer_and_those_below(module):
    assert not [imported for imported in GRAPH[module] if layer(imported) > layer(module)]


def test_imports_have_no_circle():
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def questions(source: str) -> set[str]:
    """What a source asks about devices, autocast and the compiler."""
    nodes = list(ast.walk(ast.parse(source)))
    found = {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)}
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{name.name}" for name in node.names}
    return {asked for asked in found if QUESTION.fullmatch(asked) or QUESTION.match(f"{asked}.")}


@pytest.mark.parametrize("module", [name for name in MODULES if not name.startswith(MAY_ASK)])
def test_only_three_places_ask_for_a_device_a_dtype_or_a_compiler(module):
    assert not questions(MODULES[module].read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "source",
    [
        "x.device.type == 'cpu'",
        "device.type",
        "self.weight.is_cuda",
        "torch.is_autocast_enabled('cpu')",
        "torch.get_autocast_dtype('cpu')",
        "torch.compile(f)",
        "torch.compiler.is_compiling()",
        "torch.cuda.is_available()",
        "from torch._inductor import config",
        "import torch._dynamo",
        "from torch import compile",
    ],
)
def test_the_search_finds_each_kind_of_question(source):
    assert questions(source)


def test_the_search_spares_what_asks_nothing():
    assert not questions(
        "torch.zeros(3, device=x.device)\nx.dtype\nnode.type\nmodel.compile_decoding\ntorch.device('cpu')"
    )
