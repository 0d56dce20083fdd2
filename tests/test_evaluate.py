"""`python -m llm.evaluate`: the loss of a text, summed token by token, and the bytes of what was predicted."""

import json
import math
import re

import pytest
import torch
from test_gguf import write_gguf
from tokenizers import Tokenizer
from training import saved_steps, train_baseline, write_corpus

from llm.evaluate import evaluate_text
from llm.evaluate import main as evaluate
from llm.generate.load import load_run
from llm.models.case_studies.llama import Llama
from llm.pretrained import export_pretrained

STORIES = ["Once upon a time, there was a café.", "Tim saw a dog. The dog was big and red and it ran to him."]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def places(data, tmp_path_factory):
    """The same kinds of things that `llm.generate` reads: a run, a checkpoint, a hub folder and a GGUF file."""
    folder = tmp_path_factory.mktemp("models")
    run = train_baseline(data, folder / "run", "--steps", 2, "--eval-every", 2, "--save-every", 2)
    tokenizer = data / "tokenizer-bpe.json"
    words = Tokenizer.from_file(str(tokenizer))
    names = [words.id_to_token(i) for i in range(words.get_vocab_size())]
    sizes = {"vocab_size": len(names), "n_layers": 1, "max_seq_len": 20}
    torch.manual_seed(0)
    hub = export_pretrained(Llama(Llama.Config(**Llama.Config.small | sizes)), folder / "hub", tokenizer)

    def add(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(names)
        writer.add_token_merges([" ".join(pair) for pair in json.loads(words.to_str())["model"]["merges"]])
        writer.add_token_types([3 if name == "<|endoftext|>" else 1 for name in names])

    _, gguf = write_gguf(folder, "llama", False, add, vocab_size=len(names))
    checkpoint = run / "checkpoints" / f"step-{saved_steps(run)[-1]:06d}"
    return {"run": run, "checkpoint": checkpoint, "hub": hub, "gguf": gguf}


def one_by_one(model, documents, length):
    """Nats of each token after the first of its window, from the whole window before it."""
    tokens = [token for document in documents for token in document]
    n_windows = (len(tokens) - 1) // length or 1
    nats, targets = 0.0, tokens[1 : n_windows * length + 1]
    with torch.no_grad():
        for i, target in enumerate(targets):
            seen = tokens[i // length * length : i + 1]
            nats -= model.double()(torch.tensor([seen]))[0, -1].log_softmax(-1)[target].item()
    return nats, targets


@pytest.mark.parametrize("kind", ["run", "checkpoint", "hub", "gguf"])
def test_nats_perplexity_and_bits_are_those_of_one_token_after_the_other(places, tmp_path, kind, capsys):
    (tmp_path / "text.txt").write_text("<|endoftext|>\n".join(STORIES), encoding="utf-8")
    evaluate([str(places[kind]), "--text", str(tmp_path / "text.txt"), "--device", "cpu", "--batch-size", "2"])
    shown = capsys.readouterr()
    said = re.fullmatch(
        r"([\d,]+) tokens, ([\d,]+) bytes: ([\d.]+) nats per token, perplexity ([\d.]+), ([\d.]+) bits per byte\n",
        shown.out,
    )
    n_tokens, n_bytes, loss, perplexity, bits = (float(number.replace(",", "")) for number in said.groups())
    assert "evaluating" in shown.err and "100%" in shown.err
    model, tokenizer = load_run(places[kind], torch.device("cpu"))
    end = tokenizer.token_to_id("<|endoftext|>")
    documents = [tokenizer.encode(story).ids for story in STORIES]
    if kind in ("run", "checkpoint"):
        documents = [[*ids, end] for ids in documents]
    assert kind != "hub" or documents[0][0] == end
    nats, targets = one_by_one(model, documents, model.config.max_seq_len)
    text = tokenizer.decode([token for token in targets if token != end])
    assert (n_tokens, n_bytes) == (len(targets), len(text.encode()))
    assert loss == pytest.approx(nats / len(targets), abs=1e-5)
    assert perplexity == pytest.approx(math.exp(nats / len(targets)), rel=1e-4)
    assert bits == pytest.approx(nats / math.log(2) / len(text.encode()), abs=2e-4)


def test_stories_alone_begin_anew_and_cover_every_token(places):
    model, tokenizer = load_run(places["run"], torch.device("cpu"))
    end, nats, n_tokens = tokenizer.token_to_id("<|endoftext|>"), 0.0, 0
    for story in STORIES:
        ids = [end, *tokenizer.encode(story).ids, end]
        more, targets = one_by_one(model, [ids[:33]], 32)  # the context is 32 tokens
        nats, n_tokens = nats + more, n_tokens + len(targets)
        if len(ids) > 33:
            more, targets = one_by_one(model, [ids[32:]], 32)
            nats, n_tokens = nats + more, n_tokens + len(targets)
    result = evaluate_text(model.float(), tokenizer, STORIES, "stories")
    assert result.n_tokens == n_tokens and result.n_bytes == sum(len(story.encode()) for story in STORIES)
    assert result.nats == pytest.approx(nats, rel=1e-5)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("Once upon".encode("utf-16"), r"text.txt is UTF-16.*iconv.*"),
        ("Once upon".encode("utf-32"), r"text.txt is UTF-32.*iconv.*"),
        (b"caf\xe9 " * 5, r"text.txt cannot be read as UTF-8 text.*\(--text\)"),
        (b" <|endoftext|>\n", r"holds no text \(--text\)"),
        (b"a", r"fewer than two tokens.*\(--text\)"),
    ],
)
def test_a_text_that_cannot_be_evaluated_is_named_with_the_flag(places, tmp_path, content, says):
    (tmp_path / "text.txt").write_bytes(content)
    kind = "gguf"  # puts nothing before a text
    with pytest.raises(ValueError, match=says):
        evaluate([str(places[kind]), "--text", str(tmp_path / "text.txt"), "--device", "cpu"])


def test_a_byte_order_mark_is_no_part_of_the_text(places, tmp_path, capsys):
    said = []
    for mark in (b"", b"\xef\xbb\xbf"):
        (tmp_path / "text.txt").write_bytes(mark + STORIES[0].encode())
        evaluate([str(places["gguf"]), "--text", str(tmp_path / "text.txt"), "--device", "cpu"])
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
