"""`python -m llm.evaluate`: the loss of a text, summed token by token, and the bytes of what was predicted."""

import json
import math
import re

import pytest
import torch
from conftest import DENOISERS, tiny_model
from test_diffusion import log_p_in_order, orders
from test_gguf import write_gguf
from tokenizers import AddedToken, Tokenizer
from training import MODEL, RUN, command_line, saved_steps, script, train_baseline, write_corpus

from llm.data.files import load_tokenizer
from llm.evaluate import cut, encode, evaluate_text
from llm.evaluate import main as evaluate
from llm.generate.load import load_run
from llm.hub.folder import load_hub_tokenizer
from llm.models.case_studies.llama import Llama
from llm.pretrained import export_pretrained
from llm.training.device import Machine
from llm.training.distributed import Ranks
from llm.training.evaluate import MAX_ERROR, EvalSet
from llm.training.evaluate import evaluate as evaluate_in_training

STORIES = ["Once upon a time, there was a café.", "Tim saw a dog. The dog was big and red and it ran to him."]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def words(data):
    return load_tokenizer(data / "tokenizer-bpe.json")


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


@pytest.mark.parametrize("name", ["llama", "gemma2", "granitemoehybrid"])
@pytest.mark.parametrize("per", ["windows", "stories"])
def test_the_logits_of_a_few_tokens_are_held_at_once(words, name, per, monkeypatch):
    """And only of tokens that are predicted. Gemma 2 and Granite change their logits."""
    model, rows = tiny_model(name, vocab_size=300, max_seq_len=16), []
    unembed = model.unembed
    monkeypatch.setattr(model, "unembed", lambda x: rows.append(x.shape[:-1].numel()) or unembed(x))
    whole = evaluate_text(model, words, STORIES * 2, per)
    assert sum(rows) == whole.n_tokens and max(rows) > 7
    rows.clear()
    monkeypatch.setattr("llm.evaluate.ROWS", 7)
    few = evaluate_text(model, words, STORIES * 2, per)
    assert sum(rows) == few.n_tokens == whole.n_tokens and max(rows) == 7
    assert few.nats / few.n_tokens == pytest.approx(whole.nats / whole.n_tokens, abs=1e-6)


@pytest.mark.parametrize("per", ["windows", "stories"])
def test_special_tokens_written_in_a_text_count_no_bytes(places, per):
    """Neither in a whole story nor in the part of one in which the last window ends."""
    tokenizer = load_hub_tokenizer(places["hub"])
    tokenizer.add_special_tokens([AddedToken("<|im_end|>", normalized=False), AddedToken("<unk>", normalized=False)])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])  # an ordinary one
    model = tiny_model("llama", vocab_size=tokenizer.get_vocab_size(), max_seq_len=10)
    stories = ["a<|im_end|><|im_end|>é <think>b<|im_end|>", f"<unk>{STORIES[1]}<|im_end|> c"]
    result = evaluate_text(model, tokenizer, stories, per)
    documents = [tokenizer.encode(story).ids for story in stories]
    assert [tokenizer.id_to_token(ids[0]) for ids in documents] == ["<|endoftext|>"] * 2
    if per == "windows":
        tokens = [token for ids in documents for token in ids]
        documents = [tokens[: result.n_tokens + 1]]
        assert len(documents[0]) < len(tokens), "the last window must end within a story"
    assert result.n_tokens == sum(map(len, documents)) - len(documents)
    assert result.n_bytes == sum(len(tokenizer.decode(ids).encode()) for ids in documents)


@pytest.mark.parametrize("name", ["llama", "masked_diffusion"])
def test_a_token_that_the_model_does_not_have_is_named(words, name):
    """The embedding of a diffusion model has one vector more, which is no token of a text either."""
    largest = max(words.encode(STORIES[0]).ids)
    model = tiny_model(name, vocab_size=largest)
    with pytest.raises(ValueError, match=f"holds token {largest}, .* this model ends at {largest - 1}.*take the one"):
        evaluate_text(model, words, STORIES[:1])


def test_a_byte_order_mark_is_no_part_of_the_text(places, tmp_path, capsys):
    said = []
    for mark in (b"", b"\xef\xbb\xbf"):
        (tmp_path / "text.txt").write_bytes(mark + STORIES[0].encode())
        evaluate([str(places["gguf"]), "--text", str(tmp_path / "text.txt"), "--device", "cpu"])
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]


@pytest.fixture
def coarse(monkeypatch):
    """The standard error up to which draws are added: five times as large, for a 25th of the draws."""
    for module in ("llm.evaluate", "llm.training.evaluate"):
        monkeypatch.setattr(f"{module}.MAX_ERROR", 5 * MAX_ERROR)
    return 5 * MAX_ERROR


def test_the_command_calls_the_bound_of_a_diffusion_model_one(data, tmp_path, capsys):
    out = tmp_path / "run"
    few = ("--steps", 2, "--eval-every", 2, "--save-every", 2)
    script("train_masked_diffusion").main(command_line(RUN | MODEL | {"--data": data, "--out": out}, *few))
    (tmp_path / "text.txt").write_text("<|endoftext|>".join(STORIES), encoding="utf-8")
    capsys.readouterr()
    evaluate([str(out), "--text", str(tmp_path / "text.txt"), "--device", "cpu"])
    shown = capsys.readouterr()
    said = re.fullmatch(
        r"32 tokens, ([\d,]+) bytes: at most ([\d.]+) ± ([\d.]+) nats per token, perplexity at most ([\d.]+), "
        r"at most ([\d.]+) ± ([\d.]+) bits per byte \(a bound and its standard error\)\n",
        shown.out,
    )
    n_bytes, loss, error, perplexity, bits, bits_error = (float(number.replace(",", "")) for number in said.groups())
    assert "100%" in shown.err and 0 < error <= MAX_ERROR
    assert perplexity == pytest.approx(math.exp(loss), rel=1e-4)
    assert bits == pytest.approx(loss * 32 / math.log(2) / n_bytes, abs=2e-4)
    assert bits_error == pytest.approx(error * 32 / math.log(2) / n_bytes, abs=2e-4)


@pytest.mark.parametrize("name", DENOISERS)
def test_the_bound_of_windows_is_that_of_training(words, name, coarse):
    model, stories = tiny_model(name, vocab_size=300, max_seq_len=16), STORIES * 4
    found = evaluate_text(model, words, stories, batch_size=3)
    windows = list(cut(encode(words, stories, "windows")[0], 16, "windows"))
    eval_set = EvalSet(torch.tensor(windows), 1)
    expected = evaluate_in_training(model, eval_set, 4, Machine(torch.device("cpu"), False, False), Ranks())
    assert found.n_tokens == 16 * len(windows) >= 100
    error = found.error / found.n_tokens
    if name == "autoregressive_twin":
        assert error < 1e-9
        assert found.nats / found.n_tokens == pytest.approx(expected["eval_loss"], abs=1e-6)
    else:
        assert 0 < error <= coarse and 0 < expected["eval_loss_error"] <= coarse
        both = math.hypot(error, expected["eval_loss_error"])
        assert found.nats / found.n_tokens == pytest.approx(expected["eval_loss"], abs=4 * both)


@pytest.mark.parametrize("name", ["masked_diffusion", "dream", "autoregressive_twin"])
def test_the_bound_of_stories_is_the_mean_over_all_orders_of_each_alone(words, name, coarse):
    """Stories of two and of four targets in one evaluation: padding would be seen, and change the value."""
    model, stories = tiny_model(name, vocab_size=300), ["a", "Tim", "is"]
    documents, _ = encode(words, stories, "stories")
    assert len({len(document) for document in documents}) > 1 and max(map(len, documents)) <= 5
    expected = 0.0
    with torch.no_grad():
        for document in documents:
            text = torch.tensor([document[1:]])
            by_order = [log_p_in_order(model, text, order) for order in orders(model, text.shape[1])]
            expected -= torch.stack(by_order).mean().item()
    result = evaluate_text(model, words, stories, "stories")
    assert result.n_tokens == sum(len(document) - 1 for document in documents)
    assert result.error == pytest.approx(0, abs=1e-6) if name == "autoregressive_twin" else result.error > 0
    assert result.nats == pytest.approx(expected, abs=max(4 * result.error, 1e-5))


def test_blocks_are_whole_or_refused_by_name(words, coarse):
    model = tiny_model("block_diffusion", vocab_size=300, block_size=4)
    ((ids,), _) = encode(words, [STORIES[0]], "windows")
    assert (len(ids) - 1) % 4, "choose another story"
    result = evaluate_text(model, words, [STORIES[0]])
    whole = (len(ids) - 1) // 4 * 4
    assert result.n_tokens == whole
    assert result.n_bytes == len(words.decode(ids[1 : whole + 1]).encode())
    with pytest.raises(ValueError, match=r"1 of 1 stories.* no whole number of blocks of 4 tokens.*--per windows"):
        evaluate_text(model, words, [STORIES[0]], "stories")
    with pytest.raises(ValueError, match=r"1 tokens to predict, .* blocks of 4 together.*\(--text\)"):
        evaluate_text(model, words, ["a"])
