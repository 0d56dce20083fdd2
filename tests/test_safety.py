"""No file of this repository can execute what it reads, whatever somebody puts into a checkpoint or an array."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
UNSAFE_CALLS = {"eval", "exec"}
UNSAFE_MODULES = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
UNSAFE_VALUES = {"weights_only": False, "allow_pickle": True, "shell": True, "trust_remote_code": True}
UNSAFE_ATTRIBUTES = {("os", "system"), ("os", "popen")}


def complaints(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Import):
            found += [f"{line}: import {name.name}" for name in node.names if name.name.split(".")[0] in UNSAFE_MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UNSAFE_MODULES:
            found.append(f"{line}: from {node.module}")
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if (node.value.id, node.attr) in UNSAFE_ATTRIBUTES:
                found.append(f"{line}: {node.value.id}.{node.attr}")
        elif isinstance(node, ast.Call):
            found += [f"{line}: {problem}" for problem in unsafe_call(node)]
    return found


def unsafe_call(call: ast.Call) -> list[str]:
    found = [
        f"{word.arg}={word.value.value}"
        for word in call.keywords
        if isinstance(word.value, ast.Constant) and word.arg in UNSAFE_VALUES
        if word.value.value is UNSAFE_VALUES[word.arg]
    ]
    if isinstance(call.func, ast.Name) and call.func.id in UNSAFE_CALLS:
        found.append(f"{call.func.id}()")
    if ast.unparse(call.func) == "torch.load" and "weights_only" not in {word.arg for word in call.keywords}:
        found.append("torch.load() that does not say weights_only=True")
    return found


def python_files() -> list[Path]:
    """Every Python file git knows or would add; all of them outside git."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listing.returncode == 0 and listing.stdout:
        return [ROOT / name for name in listing.stdout.splitlines() if (ROOT / name).exists()]
    return [path for path in ROOT.rglob("*.py") if not {".venv", "build"} & set(path.relative_to(ROOT).parts)]


def test_nothing_in_the_repository_can_run_what_it_reads():
    files = python_files()
    assert ROOT / "llm" / "training" / "checkpoint.py" in files and Path(__file__) in files
    found = {str(path.relative_to(ROOT)): complaints(path.read_text(encoding="utf-8")) for path in files}
    assert {name: problems for name, problems in found.items() if problems} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x', weights_only=False)",
        "import torch\ntorch.load('x')",
        "np.load('x', allow_pickle=True)",
        "subprocess.run('ls', shell=True)",
        "import os\nos.system('ls')",
        "eval('1')",
        "exec('1')",
    ],
)
def test_the_search_finds_each_kind(source):
    assert complaints(source)


def test_the_search_spares_what_is_safe():
    assert not complaints("torch.load('x', weights_only=True)\nmodel.eval()\ntorch.compile(model)\n'eval('")
