"""The commands: every script trains two steps, a story is written from what it saved, the ladder goes on."""

import itertools
import re
import runpy
import sys
import warnings

import pytest
import torch
from training import ROOT, RUN, command_line, config_of, evaluations, losses, saved_steps, script, write_corpus

from llm.data.files import load_tokenizer, open_tokens
from llm.data.windows import eval_windows
from llm.generate import __main__ as generate
from llm.generate.load import load_run
from llm.models import MODELS
from llm.training.checkpoint import CheckpointError, find_checkpoints
from llm.training.device import Machine
from llm.training.distributed import Ranks
from llm.training.evaluate import MAX_ERROR, MOST_DRAWS, EvalSet, evaluate
from llm.training.run_directory import RunDirectory

pytestmark = pytest.mark.filterwarnings("ignore:Unable to enable fault handler")
SCRIPTS = sorted(path.stem for path in (ROOT / "train_scripts").glob("train_*.py"))
TINY = RUN | {"--steps": 2, "--eval-windows": 4, "--model.n-layers": 2, "--model.max-seq-len": 32}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    monkeypatch.setattr(RunDirectory, "plot", lambda self: None)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A baseline of two steps. Read only."""
    out = tmp_path_factory.mktemp("runs") / "baseline"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunDirectory, "plot", lambda self: None)
        script().main(["--sample", *command_line(TINY | {"--data": data, "--out": out})])
    return out


# Training scripts


def test_every_model_has_its_script():
    assert [f"train_{name}" for name in sorted(MODELS)] == SCRIPTS


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_trains_its_model_which_can_be_loaded_again(data, tmp_path, name):
    """`--sample` makes the model small; the evaluation is recomputed with what was loaded from the checkpoint."""
    script(name).main(["--sample", *command_line(TINY | {"--data": data, "--out": tmp_path / "run"})])
    assert f"train_{config_of(tmp_path / 'run')['model_name']}" == name
    assert list(losses(tmp_path / "run")) == [1, 2] and saved_steps(tmp_path / "run") == [2]
    model, tokenizer = load_run(tmp_path / "run", torch.device("cpu"))
    assert type(model) is MODELS[name.removeprefix("train_")] and tokenizer.get_vocab_size() == 300
    found = evaluations(tmp_path / "run")[2]
    if not model.causal:
        eval_set = EvalSet.of(open_tokens(data), 32, 4)
        again = evaluate(model, eval_set, 4, Machine(torch.device("cpu"), bf16=False, compile=False), Ranks())
        assert found["eval_loss_error"] <= MAX_ERROR or found["eval_draws"] == MOST_DRAWS
        assert found == pytest.approx(again, rel=1e-5)
        return
    tokens = eval_windows(open_tokens(data).eval, 32, 4)
    with torch.no_grad():
        ce = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    assert found["eval_loss"] == pytest.approx(ce.item(), rel=1e-5)


def test_sample_writes_its_data_and_a_flag_still_counts(tmp_path, monkeypatch):
    def make_sample(folder):
        folder.mkdir(parents=True)
        write_corpus(folder)

    monkeypatch.setattr("llm.training.flags.make_sample", make_sample)
    monkeypatch.chdir(tmp_path)
    flags = {"--steps": 2, "--tokens-per-step": 128, "--model.max-seq-len": 32, "--wandb": "off", "--precision": "fp32"}
    script().main(["--sample", *command_line(flags)])
    config = config_of(tmp_path / "runs" / "baseline-sample")
    assert (config["train"]["steps"], config["train"]["save_every"]) == (2, 100)
    assert config["train"]["data"] == "data/sample" and config["model"]["d_model"] == 128


def test_without_sample_the_defaults_are_the_full_job(data, tmp_path, monkeypatch):
    seen = []
    module = script()
    monkeypatch.setattr(module, "train", lambda *arguments: seen.extend(arguments))
    module.main(["--data", str(data)])
    _, model, train, _ = seen
    assert (train.steps, train.tokens_per_step, train.steps * train.tokens_per_step) == (2500, 131_072, 327_680_000)
    assert (model.n_layers, model.d_model, model.n_heads, model.d_ff, model.max_seq_len) == (4, 512, 16, 2048, 512)


def help_of(main, capsys) -> str:
    """What `--help` prints; exit status 0, which torch's `record` turns into a return."""
    capsys.readouterr()
    try:
        main(["--help"])
    except SystemExit as end:
        assert end.code == 0
    return capsys.readouterr().out


def test_help_describes_the_fields_of_a_models_own_config(capsys):
    words = " ".join(re.sub(r"[│╭╮╰╯─]", " ", help_of(script("train_grouped_query").main, capsys)).split())
    assert re.search(r"--model\.n-kv-heads INT [A-Z]\w+ .*?\(default: \d+\)", words)


def test_help_names_every_flag_and_what_it_does(capsys):
    text = help_of(script().main, capsys)
    words = " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())
    for flag in ("--max-lr", "--save-every", "--resume", "--model.n-layers", "--model.n-heads", "--sample"):
        assert f"{flag} " in words
    for sentence in ("Learning rate after the warm-up", "Attention heads; must divide d_model", "(default: 2500)"):
        assert sentence in words


# Stories


def write_stories(capsys, *arguments) -> tuple[str, str]:
    capsys.readouterr()
    generate.main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return said.out, said.err


def test_a_story_is_written_from_a_run_or_from_a_checkpoint(run, capsys):
    story, _ = write_stories(capsys, run, "--prompt", "Tom had a", "--max-new-tokens", 12)
    assert story.startswith("Tom had a") and len(story) > len("Tom had a\n")
    (checkpoint,) = find_checkpoints(run / "checkpoints")
    assert write_stories(capsys, checkpoint, "--prompt", "Tom had a", "--max-new-tokens", 12)[0] == story
    hot = ("--prompt", "Tom had a", "--max-new-tokens", 12, "--temperature", 5)
    stories = [write_stories(capsys, run, *hot, "--seed", seed)[0] for seed in (0, 0, 1)]
    assert stories[0] == stories[1] != stories[2]
    assert write_stories(capsys, run, "--max-new-tokens", 1)[0].startswith("Once upon a time")


def test_several_prompts_and_samples_each_get_their_number(run, capsys):
    prompts = ("--prompt", "Tom", "--prompt", "The little dog was")
    said, _ = write_stories(capsys, run, *prompts, "--samples", 2, "--max-new-tokens", 8, "--temperature", 5)
    stories = re.split(r"--- \d ---\n", said)[1:]
    assert len(stories) == 4
    assert [story.startswith("Tom") for story in stories] == [True, True, False, False]
    assert all(story.startswith("The little dog was") for story in stories[2:])
    assert stories[0] != stories[1]


def test_a_story_of_several_is_the_one_it_would_be_alone(run, capsys):
    flags = ("--max-new-tokens", 8, "--temperature", 0)
    together, _ = write_stories(capsys, run, "--prompt", "Tom", "--prompt", "The little dog was", *flags)
    for prompt in ("Tom", "The little dog was"):
        assert write_stories(capsys, run, "--prompt", prompt, *flags)[0].strip() in together


@pytest.mark.parametrize(
    ("tokens", "as_text"),
    [("the ", "fewer tokens when encoded again"), ("\N{LATIN CAPITAL LETTER A WITH TILDE}", "more")],
)
def test_a_story_that_fills_the_context_says_so(run, capsys, monkeypatch, tokens, as_text):
    """One token a letter, which as text would be merged; and bytes that are no character, which as text are longer."""
    _, tokenizer = load_run(run, torch.device("cpu"))
    letters = itertools.cycle(
        tokenizer.token_to_id(letter.replace(" ", "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}")) for letter in tokens
    )
    monkeypatch.setattr(generate, "Sampler", lambda *_: lambda logits: torch.tensor([next(letters)]))
    _, said = write_stories(capsys, run)
    assert "stopped at max_seq_len = 32" in said
    _, said = write_stories(capsys, run, "--max-new-tokens", 12)
    assert said == ""


def as_a_command(monkeypatch, capsys, *arguments) -> str:
    """What `python -m llm.generate` says when it fails."""
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["generate", *map(str, arguments)])
    with warnings.catch_warnings(), pytest.raises(SystemExit) as end:
        warnings.simplefilter("ignore")  # the module is imported already
        runpy.run_module("llm.generate", run_name="__main__")
    assert end.value.code not in (0, None)
    return f"{end.value.code} {capsys.readouterr().err}"


def test_what_cannot_be_generated_is_said_in_a_line(run, tmp_path, monkeypatch, capsys):
    said = as_a_command(monkeypatch, capsys, tmp_path / "nowhere")
    assert f"error: {tmp_path / 'nowhere'} holds no complete checkpoint" in said
    long = as_a_command(monkeypatch, capsys, run, "--prompt", "a long story " * 20)
    assert "this model reads max_seq_len = 32" in long
    assert "top_p = 2.0 must lie in (0, 1] (--top-p)" in as_a_command(monkeypatch, capsys, run, "--top-p", 2)
    assert "'tpu' is no device" in as_a_command(monkeypatch, capsys, run, "--device", "tpu")
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        generate.main([str(tmp_path)])


def test_a_checkpoint_alone_is_enough(run, data, tmp_path, monkeypatch, capsys):
    """Without the data and without the run directory around it."""
    (checkpoint,) = find_checkpoints(run / "checkpoints")
    alone = tmp_path / "sent by a friend"
    alone.mkdir()
    for file in checkpoint.iterdir():
        (alone / file.name).write_bytes(file.read_bytes())
    monkeypatch.chdir(tmp_path)
    _, tokenizer = load_run(alone, torch.device("cpu"))
    assert tokenizer.to_str() == load_tokenizer(data / "tokenizer-bpe.json").to_str()
    assert write_stories(capsys, alone, "--max-new-tokens", 4)[0].startswith("Once upon a time")
