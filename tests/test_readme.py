"""README and the pages it links to: links lead somewhere, commands can be given, and every model has its row."""

import ast
import importlib
import importlib.util
import inspect
import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from training import ROOT, load

from llm.models import MODELS

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md", ROOT / "data" / "README.md"]
SHELL = ("bash", "sh", "shell", "console")
COMMAND = re.compile(r"(\$ )?([A-Z_]+=\S+ )?(uv run |python |torchrun |pytest\b|\./\w|benchmarks/\w+\.py)")
EXAMPLE = ("llm/models/squared_relu.py", "train_scripts/train_squared_relu.py")  # what README lets a user write
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of a page in these languages."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", text_of(page), re.DOTALL | re.MULTILINE)
    return [block for language, block in found if language in languages]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", text_of(page), flags=re.DOTALL | re.MULTILINE)


def spans(page: Path) -> list[str]:
    """What stands in backticks in the prose of a page."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


def links(page: Path) -> list[tuple[Path, str]]:
    """The relative links of a page as (file, heading); the heading is empty where a link names none."""
    found = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    parts = [link.partition("#") for link in found if "://" not in link and not link.startswith("mailto:")]
    return [((page.parent / path).resolve() if path else page, heading) for path, _, heading in parts]


def headings(page: Path) -> set[str]:
    """The headings of a page as a link spells them."""
    found = re.findall(r"^#+ (.*)", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


# Links


@every_page
def test_every_relative_link_leads_somewhere(page):
    assert not [str(path) for path, _ in links(page) if not path.exists()]
    assert not [heading for path, heading in links(page) if heading and heading not in headings(path)]


@every_page
def test_every_file_of_ours_that_a_page_names_exists(page):
    named = [span for span in spans(page) if re.fullmatch(r"(llm|tests|train_scripts|benchmarks|docs)/[\w./-]+", span)]
    assert not [path for path in named if path not in EXAMPLE and not (ROOT / path).exists()]


def test_readme_links_to_every_page_and_takes_two_minutes():
    assert set(PAGES) - {README} <= {path for path, _ in links(README)}
    assert len(text_of(README).splitlines()) <= 150


# Commands


def commands(page: Path) -> list[list[str]]:
    """The words of every command of ours, in blocks and in backticks, without `uv run` and its options. A command with
    a placeholder such as `<model>` is left out."""
    lines = "".join(blocks(page, *SHELL)).replace("\\\n", " ").splitlines() + spans(page)
    words = [shlex.split(line.removeprefix("$ "), comments=True) for line in lines if COMMAND.match(line)]
    found = [plain(part) for line in words for part in between_operators(line)]
    return [words for words in found if COMMAND.match(" ".join(words) + " ") and not re.search(r"<\w+>", str(words))]


def between_operators(words: list[str]) -> Iterator[list[str]]:
    for is_operator, part in itertools.groupby(words, key=lambda word: word in ("&&", "|", ";")):
        if not is_operator:
            yield list(part)


def plain(words: list[str]) -> list[str]:
    """A command without variables of the environment and without `uv run ..` before it, with `python` before a path."""
    words = list(itertools.dropwhile(lambda word: re.match(r"[A-Z_]+=", word), words))
    if words[:2] == ["uv", "run"]:
        words = list(itertools.dropwhile(lambda word: word not in ("python", "torchrun", "pytest"), words))
    return ["python", *words] if words[0].endswith(".py") else words


def target_of(words: list[str]) -> tuple[str, list[str]]:
    """What a command runs, as a path or a module, and its arguments."""
    if words[0] == "torchrun":
        at = next(i for i, word in enumerate(words) if word.endswith(".py"))
        return words[at], words[at + 1 :]
    if words[0] == "python":
        return (words[2], words[3:]) if words[1] == "-m" else (words[1], words[2:])
    return words[0], words[1:]


def main_of(target: str, patch: pytest.MonkeyPatch):
    """The function behind a path or a module, which is imported and not run."""
    if target.endswith(".py"):
        patch.syspath_prepend((ROOT / target).parent)  # a script may import another one beside it
        return load(ROOT / target).main
    is_package = importlib.util.find_spec(target).submodule_search_locations is not None
    return importlib.import_module(f"{target}.__main__" if is_package else target).main


def help_of(main, capsys, *subcommand: str) -> str:
    """What `--help` prints; exit status 0, which torch's `record` turns into a return."""
    capsys.readouterr()
    try:
        main([*subcommand, "--help"])
    except SystemExit as end:
        assert end.code == 0
    return capsys.readouterr().out


def flags_of(words: list[str]) -> set[str]:
    """The flags among the arguments; what follows `--` is for another script."""
    own = itertools.takewhile(lambda word: word != "--", words)
    return {word.partition("=")[0] for word in own if word.startswith("--")}


def test_readme_has_the_commands_that_a_user_begins_with():
    given = [" ".join(words) for words in commands(README)]
    assert {"python train_scripts/train_baseline.py --sample", "pytest", "./download.sh"} <= set(given)
    assert {"pre_tokenize.py", "llm.generate"} <= {target_of(words)[0] for words in commands(README)}


@pytest.mark.filterwarnings("ignore:Unable to enable fault handler")
@pytest.mark.parametrize(
    "command", [pytest.param(words, id=" ".join(words)) for words in {tuple(c): c for p in PAGES for c in commands(p)}]
)
def test_a_command_can_be_given(command, capsys, monkeypatch):
    target, given = target_of(list(command))
    if target == "pytest":
        files = [name for word in given if not word.startswith("--") for name in with_braces(word)]
        assert not [name for name in files if not (ROOT / name).is_file()]
        assert not [flag for flag in flags_of(given) if flag not in text_of(ROOT / "tests" / "conftest.py")]
    elif target.startswith("./"):
        assert (ROOT / target).is_file() and not given
    elif target.endswith(".py") or target.startswith("llm."):
        subcommand = given[:1] if target == "llm.pretrained" else []
        known = re.findall(r"--[a-z][\w.-]*", help_of(main_of(target, monkeypatch), capsys, *subcommand))
        assert flags_of(given) <= set(known), f"{target} has no {sorted(flags_of(given) - set(known))}"


def with_braces(word: str) -> list[str]:
    """`a{b,c}d` as a shell reads it: abd, acd."""
    before, choices, after = re.fullmatch(r"([^{]*)(?:\{(.*)\})?(.*)", word).groups()
    return [f"{before}{choice}{after}" for choice in (choices or "").split(",")]


# Models


def test_every_model_has_one_row_that_links_to_its_file():
    rows = set()
    for page in (README, ROOT / "docs" / "case_studies.md"):
        table = "\n".join(line for line in text_of(page).splitlines() if line.startswith("|"))
        links = re.findall(r"\[(\w+)\]\(([^)]+\.py)\)", table)
        rows |= {(name, (page.parent / path).resolve()) for name, path in links}
    assert rows == {(name, Path(inspect.getfile(Model)).resolve()) for name, Model in MODELS.items()}


@pytest.mark.parametrize("code", [block for page in PAGES for block in blocks(page, "python")])
def test_what_a_page_imports_exists(code):
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert not [name.name for name in node.names if not hasattr(module, name.name)]


def test_the_model_that_readme_adds_is_the_baseline_with_another_activation(tmp_path):
    (tmp_path / "squared_relu.py").write_text(*blocks(README, "python"), encoding="utf-8")
    Model, Baseline = load(tmp_path / "squared_relu.py").SquaredReLU, MODELS["baseline"]
    config = Model.Config(**{**Model.Config.small, "vocab_size": 97, "n_layers": 2})
    model, baseline = Model(config), Baseline(config)
    baseline.load_state_dict(model.state_dict())
    tokens, x = torch.randint(97, (2, 17)), torch.randn(3, config.d_model)
    ffn = model.blocks[0].ffn
    assert ffn(x).equal(ffn.down_proj(ffn.up_proj(x).clamp(min=0).square()))
    assert model.loss(tokens)[0].isfinite() and not model(tokens).equal(baseline(tokens))
