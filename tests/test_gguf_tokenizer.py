"""The tokenizers of GGUF files: llama.cpp's rules, which define the format, and transformers' tokenizers where they
follow them."""

import json
import re
from itertools import pairwise

import pytest
from test_gguf import write_gguf
from tokenizers import pre_tokenizers

from llm.data.vocabulary import train_bpe
from llm.hub.gguf import GGUFFile
from llm.hub.gguf_tokenizer import gguf_tokenizer

transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf")

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
WORDS = ["▁t", "he", "▁the", "▁d", "og", "▁dog", "▁▁", "er", "▁th", "ere", "▁there", "in", *"▁thedogriné,42"]
WRITTEN = {"<unk>": UNKNOWN, "<s>": CONTROL, "</s>": CONTROL, "<think>": USER_DEFINED}
PIECES = [*WRITTEN, *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
TYPES = [*WRITTEN.values(), *[BYTE] * 256, *[NORMAL] * len(WORDS)]
SCORES = {piece: -float(i) for i, piece in enumerate(WORDS)}
PLAIN = ["the dog", "there in, the  dog ", "thé 🙂\n\nx", "42", ""]
SPACED = [" the dog", "  dog", " é 🙂\n\nx"]
MARKED = ["</s> the", "</s>the", "the</s>dog <think> in</s>", "<unk>the dog"]


def sentencepiece_file(folder, family, prefix):
    """A GGUF file whose metadata say whether a space comes before a text; None: they say nothing."""

    def add(writer):
        writer.add_tokenizer_model("llama")
        writer.add_token_list(PIECES)
        writer.add_token_scores([SCORES.get(piece, -1000.0) for piece in PIECES])
        writer.add_token_types(TYPES)
        writer.add_unk_token_id(0)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        if prefix is not None:
            writer.add_add_space_prefix(prefix)

    return write_gguf(folder, family, False, add, vocab_size=len(PIECES))[1]


def as_llama_cpp(text: str, prefix: bool) -> list[str]:
    """`llm_tokenizer_spm` of llama.cpp: tokens that are written out cut the text; a space comes before each part; then
    the neighbours whose token has the best score become one, the left ones first, and the rest is written in bytes."""
    found = ["<s>"]
    for part in re.split(f"({'|'.join(map(re.escape, WRITTEN))})", text):
        if part in WRITTEN or not part:
            found += [part] if part else []
            continue
        symbols = list((" " * prefix + part).replace(" ", "▁"))
        while pairs := [(SCORES[a + b], -i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in SCORES]:
            i = -max(pairs)[1]
            symbols[i : i + 2] = ["".join(symbols[i : i + 2])]
        for symbol in symbols:
            found += [symbol] if symbol in SCORES else [f"<0x{byte:02X}>" for byte in symbol.encode()]
    return found


@pytest.mark.parametrize("prefix", [None, True, False])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
def test_a_sentencepiece_tokenizer_is_that_of_llama_cpp(tmp_path, family, prefix):
    """Where the metadata say nothing, llama.cpp puts a space before a text, whatever the model. It does so even where
    the text begins with one, and after each special token.

    transformers' Llama tokenizer does not double the space, puts none after a special token, and never reads
    add_space_prefix; its Gemma tokenizer never puts one. So it is held to ours where that makes no difference.
    """
    file = sentencepiece_file(tmp_path, family, prefix)
    ours = gguf_tokenizer(GGUFFile(file))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    same = PLAIN if family == "llama" else [*PLAIN, *SPACED, *MARKED]
    for text in [*PLAIN, *SPACED, *MARKED]:
        tokens = [PIECES[i] for i in ours.encode(text).ids]
        assert tokens == as_llama_cpp(text, prefix is not False), text
        if text in same and (prefix is not False) == (family == "llama"):
            assert tokens == theirs.convert_ids_to_tokens(theirs(text)["input_ids"]), text
    for text in [*PLAIN, *SPACED]:
        assert ours.decode(ours.encode(text).ids) == text


@pytest.mark.parametrize("pre", [None, "gpt-2", "llama-bpe", "qwen2", "smollm"])
def test_a_byte_level_tokenizer_is_that_of_transformers(tmp_path, pre):
    """But for "smollm", which transformers does not know: each digit alone, the rest as GPT-2."""
    texts = [*PLAIN, *SPACED, "It's 12345 o'clock!\r\n\n  THE dog'll", "<|endoftext|>the <think>dog", "日本 été"]
    trained = json.loads(train_bpe(texts * 3, 330).to_str())["model"]
    names = [*sorted(trained["vocab"], key=trained["vocab"].get), "<think>"]
    written = {"<|endoftext|>": CONTROL, "<think>": USER_DEFINED}

    def add(writer):
        writer.add_tokenizer_model("gpt2")
        if pre is not None:
            writer.add_tokenizer_pre(pre)
        writer.add_token_list(names)
        writer.add_token_merges([" ".join(pair) for pair in trained["merges"]])
        writer.add_token_types([written.get(name, NORMAL) for name in names])
        writer.add_bos_token_id(names.index("<|endoftext|>"))
        writer.add_add_bos_token(pre == "llama-bpe")

    _, file = write_gguf(tmp_path, "llama", False, add, vocab_size=len(names))
    ours = gguf_tokenizer(GGUFFile(file))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    for text in texts:
        parts = re.split(r"(\d)", text) if pre == "smollm" else [text]
        expected = [token for part in parts for token in theirs(part)["input_ids"]]
        assert ours.encode(text).ids == expected, text
        assert (expected[:1] == [names.index("<|endoftext|>")]) == (pre == "llama-bpe" or text.startswith("<|end"))


@pytest.mark.parametrize(
    "pre, pieces",
    [
        ("gpt-4o", ["Hello", "World", " doesn't", " cost", " ", "123", "45", "/\n", " été", "ÀLA", "!?/"]),
        ("lfm2", ["HelloWorld", " doesn", "'t", " cost", " ", "123", "45", "/\n", " étéÀLA", "!?/"]),
        ("dbrx", ["HelloWorld", " doesn", "'t", " cost", " ", "123", "45", "/\n", " étéÀLA", "!?/"]),
        ("qwen2", ["HelloWorld", " doesn", "'t", " cost", " ", *"12345", "/\n", " étéÀLA", "!?/"]),
        ("olmo", ["HelloWorld", " doesn", "'t", " cost", " 12345", "/", "\n", " étéÀLA", "!?/"]),
    ],
)
def test_the_rules_that_split_a_text_into_words(tmp_path, pre, pieces):
    """By hand, from the regular expressions of o200k_base, Llama 3, Qwen2 and GPT-2. A token of LFM2 is a whole word
    even where no merges make it, and its texts begin with the token of beginnings."""
    names = [*bytes_alphabet(), "<s>", "HelloWorld", "zz"]

    def add(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(names)
        writer.add_token_merges(["z z"])
        writer.add_token_types([NORMAL] * 256 + [CONTROL, NORMAL, NORMAL])
        writer.add_bos_token_id(256)

    _, file = write_gguf(tmp_path, "llama", False, add, vocab_size=len(names))
    tokenizer = gguf_tokenizer(GGUFFile(file))
    text = "".join(pieces)
    assert [text[a:b] for _, (a, b) in tokenizer.pre_tokenizer.pre_tokenize_str(text)] == pieces
    whole = tokenizer.encode("HelloWorld").tokens
    assert whole == (["<s>", "HelloWorld"] if pre == "lfm2" else list("HelloWorld"))


def bytes_alphabet() -> list[str]:
    """The 256 characters that stand for bytes."""
    return sorted(pre_tokenizers.ByteLevel.alphabet())
