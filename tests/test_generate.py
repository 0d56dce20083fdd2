"""Sampling, texts of different lengths written together, and the command."""

import json
import runpy
import sys

import pytest
import torch
from conftest import CAUSAL, VOCABULARY, redraw, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch._dynamo.utils import counters

from llm.data.vocabulary import train_bpe
from llm.generate.__main__ import Arguments
from llm.generate.compile import compile_decoding
from llm.generate.load import build_model
from llm.generate.sampling import Sampler, generate_tokens, greedy
from llm.generate.text import TextStream, encode_prompt, write
from llm.models import MODELS
from llm.modules.cache import STEP
from llm.training.checkpoint import CheckpointError

LOGITS = torch.tensor([[2.0, 1.0, 0.5, -1.0, -3.0]])


def draws(n=4000, **settings) -> torch.Tensor:
    sampler = Sampler((torch.Generator().manual_seed(0),) * n, **settings)
    return sampler(LOGITS.expand(n, -1)).bincount(minlength=5) / n


def test_without_reshaping_tokens_come_with_their_probability():
    torch.testing.assert_close(draws(), LOGITS[0].softmax(-1), atol=0.03, rtol=0)


def test_temperature_sharpens_and_zero_takes_the_likeliest():
    torch.testing.assert_close(draws(temperature=0.5), (2 * LOGITS[0]).softmax(-1), atol=0.03, rtol=0)
    assert draws(temperature=0).tolist() == [1, 0, 0, 0, 0]


def test_top_k_keeps_k_tokens():
    kept = draws(top_k=2)
    torch.testing.assert_close(kept[:2], LOGITS[0, :2].softmax(-1), atol=0.03, rtol=0)
    assert not kept[2:].any()


def test_top_k_keeps_k_tokens_where_others_are_as_likely_as_the_last():
    sampler = Sampler((torch.Generator().manual_seed(0),) * 400, top_k=2)
    drawn = sampler(torch.tensor([[3.0, 2.0, 2.0, 2.0, 1.0]]).expand(400, -1)).bincount(minlength=5)
    assert (drawn > 0).sum() == 2
    assert drawn[0] > drawn[1:].max() > 0


@pytest.mark.parametrize("temperature", [float("nan"), 1e-38, -1.0, float("inf"), 1e-5])
def test_a_temperature_that_gives_no_probabilities_is_refused_with_the_flag(temperature):
    with pytest.raises(ValueError, match=r"temperature = .* must be 0.*from 0.0001 on \(--temperature\)"):
        Sampler((), temperature=temperature)
    with pytest.raises(ValueError, match=r"--temperature"):
        Arguments("runs/baseline", temperature=temperature)


def test_a_prompt_that_is_no_utf8_is_refused_before_the_model_is_loaded():
    with pytest.raises(ValueError, match=r"prompt 'caf\\udce9' is not valid UTF-8.*iconv.*--prompt"):
        Arguments("runs/baseline", prompt=(b"caf\xe9".decode(errors="surrogateescape"),))


def test_a_token_beyond_the_embedding_is_refused_by_its_number():
    with pytest.raises(ValueError, match=r"token 97, and the embedding of this model ends at 96.*another model"):
        list(generate_tokens(tiny_model("baseline"), [[1], [2, 97]], 1, greedy, stop=0))


@settings(deadline=None)  # a busy machine is not a mistake
@given(st.floats(0.01, 1.0))
def test_top_p_keeps_the_fewest_tokens_that_reach_p(p):
    kept = draws(n=300, top_p=p) > 0
    needed = int((LOGITS[0].softmax(-1).cumsum(-1) < p).sum()) + 1
    assert not kept[needed:].any()
    assert kept[0]


def test_the_seed_decides_what_is_drawn():
    def draw(seed):
        generators = tuple(torch.Generator().manual_seed(seed + row) for row in range(8))
        return Sampler(generators)(LOGITS.expand(8, -1)).tolist()

    assert draw(3) == draw(3)
    assert any(draw(3) != draw(seed) for seed in range(4, 8))


def test_prompts_of_different_lengths_get_what_each_gets_alone():
    model = tiny_model("baseline")
    prompts = [[5], [7, 8, 9, 10, 11], [1, 2, 3]]
    together = list(generate_tokens(model, prompts, 15, greedy, stop=0))
    for row, prompt in enumerate(prompts):
        alone = [step[0] for step in generate_tokens(model, [prompt], 15, greedy, stop=0)]
        assert [step[row] for step in together][: len(alone)] == alone


def test_a_text_ends_at_the_stop_token_and_the_others_go_on():
    class Scripted:
        config = tiny_model("baseline").config
        tok_embed = torch.nn.Embedding(1, 1)

        def generate(self, tokens, max_new_tokens, sampler, padding):
            yield from (torch.tensor(step) for step in ([4, 5], [0, 6], [7, 0], [8, 9]))

    steps = list(generate_tokens(Scripted(), [[1], [1]], 10, greedy, stop=0))
    assert steps == [[4, 5], [0, 6], [None, 0]]


def test_a_prompt_longer_than_the_context_is_refused_and_one_that_fills_it_gets_one_token():
    model = tiny_model("baseline")
    with pytest.raises(ValueError, match=r"65 tokens.*max_seq_len = 64.*shorten"):
        list(generate_tokens(model, [[1] * 65], 1, greedy, stop=0))
    expected = int(model(torch.ones(1, 64).long())[0, -1].argmax())
    assert list(generate_tokens(model, [[1] * 64], 5, greedy, stop=0)) == [[expected]]


@pytest.mark.parametrize("name", CAUSAL)
def test_a_context_of_11_tokens_gives_every_token_that_it_has_positions_for(name):
    """A prompt of n tokens and what follows fill the 11 positions, and the last one predicts one token more."""
    model = tiny_model(name, max_seq_len=11)
    for n in (1, 5, 11):
        prompt = torch.randint(VOCABULARY, (1, n), generator=torch.Generator().manual_seed(n))
        steps = generate_tokens(model, prompt.tolist(), 100, greedy, stop=-1)
        text = torch.cat([prompt, torch.tensor([[token for (token,) in steps]])], 1)
        assert text.shape == (1, 12)
        assert torch.equal(model(text[:, :11])[0, n - 1 :].argmax(-1), text[0, n:])


def test_streamed_pieces_add_up_to_the_text_even_where_a_character_takes_several_tokens():
    tokenizer = train_bpe(["a b c"], 257)
    text = "é 🙂 a"

    class Scripted:
        config = tiny_model("baseline").config
        tok_embed = torch.nn.Embedding(1, 1)

        def generate(self, tokens, max_new_tokens, sampler, padding):
            yield from (torch.tensor([token]) for token in tokenizer.encode(text).ids)

    pieces = []
    (whole,) = write(Scripted(), tokenizer, ["b"], 10, on_text=lambda row, piece: pieces.append(piece))
    assert whole == "b" + text
    assert "".join(pieces) == text
    assert pieces[0] == "é"


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = ["▁", "a", "b", "▁a", "▁ab", "ab", "é", "."]


def byte_fallback() -> Tokenizer:
    """As in Llama 2: a space before the text, and a character outside the vocabulary as its bytes."""
    vocabulary = {token: number for number, token in enumerate(["<s>", "<unk>", *BYTES, *WORDS])}
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def sentence_pieces() -> Tokenizer:
    """As T5's: a space before each word, and one token for all that is outside the vocabulary."""
    pieces = [("<s>", 0.0), ("<unk>", 0.0), *((word, -float(number)) for number, word in enumerate(WORDS, 1))]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=1))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


TOKENIZERS = {
    "byte level": train_bpe(["a b c é é 🙂 🙂"], 270),
    "byte fallback": byte_fallback(),
    "sentence pieces": sentence_pieces(),
}


def minus_prompt(everything: str, prompt: str) -> str:
    """`removeprefix`, or what follows the longest common beginning where the prompt decodes to something else alone."""
    while not everything.startswith(prompt):
        prompt = prompt[:-1]
    return everything.removeprefix(prompt)


class Scripted:
    """A model that writes what it is told."""

    config = MODELS["baseline"].Config(vocab_size=300)
    tok_embed = torch.nn.Embedding(1, 1)

    def __init__(self, tokens):
        self.tokens = tokens

    def generate(self, tokens, max_new_tokens, sampler, padding):
        yield from (torch.tensor([token]) for token in self.tokens)


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_stream_and_return_are_what_all_tokens_decode_to_minus_the_prompt_for_every_cut(kind, data):
    tokenizer, texts = TOKENIZERS[kind], st.text("ab é🙂ü.\n", max_size=5)
    prompt, pieces = data.draw(texts), []
    beginning, tokens = encode_prompt(tokenizer, prompt), st.integers(0, tokenizer.get_vocab_size() - 1)
    ids = data.draw(
        st.one_of(texts.map(lambda text: tokenizer.encode(prompt + text).ids), st.lists(tokens, max_size=8))
    )
    for cut in range(len(ids) + 1):
        stream = TextStream(tokenizer, ids[:cut])
        streamed = "".join([stream.add(token) for token in ids[cut:]] + [stream.end()])
        assert streamed == stream.written == minus_prompt(tokenizer.decode(ids), tokenizer.decode(ids[:cut]))
        if ids[cut:]:
            pieces.clear()
            (whole,) = write(
                Scripted(ids[cut:]), tokenizer, [prompt], 10, on_text=lambda row, piece: pieces.append(piece), stop=[-1]
            )
            everything = tokenizer.decode(beginning + ids[cut:])
            assert whole == prompt + "".join(pieces)
            assert "".join(pieces) == minus_prompt(everything, tokenizer.decode(beginning))


def test_a_byte_fallback_text_is_not_written_twice_and_its_end_is_not_lost():
    """A half-written character makes the complete one before it unreadable: 4 + 2 bytes that are no UTF-8 together."""
    tokenizer = TOKENIZERS["byte fallback"]
    smile, a = tokenizer.encode("🙂").ids[2:], tokenizer.token_to_id("a")
    stream = TextStream(tokenizer, tokenizer.encode("ab").ids)
    assert [stream.add(token) for token in [*smile, a, *smile, *smile[:2], a]] == [
        *[""] * 4,
        "🙂a",
        *[""] * 6,
        "\ufffd" * 6 + "a",
    ]
    assert [stream.add(smile[0]), stream.end()] == ["", "\ufffd"]


LONG = {"n_layers": 2, "max_seq_len": 2 * STEP + 20}


def long_text(model, n_tokens=STEP + 12, prompt=STEP - 8):
    """Three prompts that reach the first number of slots while they are continued, greedily, and all logits."""
    tokens = torch.randint(model.config.vocab_size, (3, prompt), generator=torch.Generator().manual_seed(1))
    logits = []

    def sampler(step):
        logits.append(step.clone())
        return greedy(step)

    steps = model.generate(tokens, n_tokens, sampler, padding=torch.tensor([0, 5, 60]))
    return tokens, torch.stack(list(steps), 1), torch.stack(logits, 1)


@pytest.mark.parametrize(
    "name",
    [
        *("baseline", "sliding_window", "streaming", "latent", "relative_position"),
        *("gated_delta_net", "hybrid", "parallel_hybrid", "rwkv7", "mamba", "lfm2", "kimi_linear"),
        *("native_sparse", "block_mixture", "deepseek_v3_2"),
    ],
)
def test_a_text_that_outgrows_its_cache_goes_on_as_if_recomputed(name):
    window = {"window_size": STEP + 40} if name in ("sliding_window", "streaming") else {}  # the ring grows, then turns
    model = tiny_model(name, **LONG, **window)
    tokens, new, logits = long_text(model)
    assert tokens.shape[1] + new.shape[1] > 2 * STEP  # it grows twice
    for row, n in enumerate((0, 5, 60)):
        text = torch.cat([tokens[row, n:], new[row, :-1]])[None]
        whole = model(text)[0, tokens.shape[1] - n - 1 :]
        torch.testing.assert_close(logits[row], whole, rtol=0, atol=1e-5)


def equal_when_compiled(name, compile_step):
    """The same text, and logits in float32 that are as near to those in float64 as without compiling."""
    model = tiny_model(name, **LONG)
    _, _, exact = long_text(model)
    _, tokens, logits = long_text(model.float())
    compile_step(model)
    _, compiled_tokens, compiled_logits = long_text(model)
    rounding = (logits - exact).abs().max().item()  # 2e-6, where logits are large (Gemma) 2e-5
    torch.testing.assert_close(compiled_logits.double(), exact, rtol=0, atol=max(1e-5, 2 * rounding))
    assert torch.equal(compiled_tokens, tokens)


def test_compiled_decoding_writes_the_same_and_compiles_once_more_when_the_cache_grows():
    counters["stats"].clear()
    equal_when_compiled("baseline", compile_decoding)
    assert counters["stats"]["unique_graphs"] == 2


def test_where_compiling_fails_the_text_is_written_eagerly_unless_it_was_insisted_on(monkeypatch, capsys):
    def fail(*arguments, **options):
        raise RuntimeError("no compiler here\nand more")

    monkeypatch.setattr(torch, "compile", fail)
    equal_when_compiled("baseline", lambda model: compile_decoding(model, insist=False))
    assert capsys.readouterr().err == "not compiled: RuntimeError: no compiler here\n"
    with pytest.raises(RuntimeError, match="no compiler here"):
        equal_when_compiled("baseline", compile_decoding)


def test_a_step_that_fails_half_way_is_done_once(monkeypatch, capsys):
    def compile_badly(decode, **options):
        def step(tokens, cache):
            decode(tokens, cache)
            raise RuntimeError("the graph was not recorded")

        return step

    monkeypatch.setattr(torch, "compile", compile_badly)
    equal_when_compiled("sliding_window", lambda model: compile_decoding(model, insist=False))
    assert "the graph was not recorded" in capsys.readouterr().err


def test_a_step_that_breaks_into_several_graphs_keeps_its_layers_apart():
    """In fp32 experts are computed outside the graph: what follows is one code for all layers, told apart by guards."""
    equal_when_compiled("switch_transformer", compile_decoding)


def test_models_of_one_kind_are_told_apart_when_the_steps_of_both_are_compiled():
    models = [tiny_model("baseline", **LONG).float() for _ in range(2)]
    redraw(models[1])
    eager = [long_text(model, 4)[2] for model in models]
    assert (eager[0] - eager[1]).abs().max() > 1
    for model in models:
        compile_decoding(model)
    for n in (0, 1, 0):
        torch.testing.assert_close(long_text(models[n], 4)[2], eager[n], rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", CAUSAL)
def test_every_model_writes_the_same_when_its_step_is_compiled(name):
    torch.compiler.reset()
    equal_when_compiled(name, compile_decoding)


@pytest.mark.slow
@pytest.mark.parametrize("name", CAUSAL)
def test_in_bf16_a_compiled_step_is_as_near_to_float64_as_an_eager_one(name):
    torch.compiler.reset()
    prompt, text = torch.randint(VOCABULARY, (2, 2, STEP - 8), generator=torch.Generator().manual_seed(1))

    def logits(model):
        told, seen = iter(text.T), []

        def sampler(step):
            seen.append(step.double().clone())
            return next(told)

        list(model.generate(prompt, 20, sampler))
        return torch.stack(seen)

    model = tiny_model(name, **LONG)
    exact = logits(model)
    eager = logits(model.to(torch.bfloat16))
    compile_decoding(model)
    error, rounding = (logits(model) - exact).abs().mean(), (eager - exact).abs().mean()
    assert error < 1.5 * rounding


# The command


@pytest.mark.parametrize(
    ("saved", "says"),
    [
        ({"model_name": "gone", "model": {}}, r"holds a 'gone'; known are .*baseline.*the version of this code"),
        ({"model_name": "baseline", "model": {"d_model": 8, "n_wheels": 4}}, r"sets n_wheels, which a 'baseline' does"),
    ],
)
def test_a_checkpoint_of_another_version_of_the_code_is_refused_by_name(tmp_path, saved, says):
    (tmp_path / "config.json").write_text(json.dumps(saved), encoding="utf-8")
    with pytest.raises(CheckpointError, match=says):
        build_model(tmp_path)


def test_ctrl_c_while_a_story_streams_ends_it_quietly(monkeypatch, capsys):
    tokenizer, model = train_bpe(["a b c"], 257), tiny_model("baseline")

    def write_one(tokens, max_new_tokens, sampler, padding):
        yield torch.tensor(tokenizer.encode("!").ids)
        raise KeyboardInterrupt

    model.generate = write_one
    monkeypatch.setattr("llm.hub.folder.stop_tokens", lambda path: ())
    monkeypatch.setattr("llm.generate.load.load_run", lambda path, device, max_seq_len=None: (model, tokenizer))
    monkeypatch.setattr(sys, "argv", ["generate", "somewhere", "--prompt", "b"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("llm.generate", run_name="__main__")
    assert stopped.value.code == 130
    assert capsys.readouterr() == ("b!\n", "")
