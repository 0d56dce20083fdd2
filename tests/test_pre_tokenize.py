"""Text to token arrays: what a story is, that nothing of it gets lost, that no fault leaves what only looks whole."""

import errno
import hashlib
import json
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import pre_tokenize as command
from llm.data import encoding, stories, tokenize, vocabulary
from llm.data.bpe import learn_merges
from llm.data.encoding import text_encoder, word_counter
from llm.data.files import load_tokenizer, token_bytes
from llm.data.sample import make_sample, sample_stories
from llm.data.stories import END_OF_TEXT, Tally, cut, read_stories
from llm.data.tokenize import pre_tokenize
from llm.data.vocabulary import make_tokenizer, train_bpe

ROOT = Path(__file__).resolve().parent.parent
SEPARATOR = END_OF_TEXT.encode()
OUTPUTS = (
    "tokenizer-bpe.json",
    "tinystories_train_tokens.npy",
    "tinystories_eval_tokens.npy",
    "tinystories_tokens.json",
)


class NoBar:
    def update(self, n):
        pass


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(sample_stories()["train"][:300], 800)


def read(tmp_path, raw: bytes) -> tuple[list[str], Tally]:
    """Return the stories of a file with these bytes, whole again where they were cut."""
    path, tally, whole = tmp_path / "text.txt", Tally(), [b""]
    path.write_bytes(raw)
    for texts, last in read_stories(path, tally, NoBar()):
        for i, text in enumerate(texts):
            whole[-1] += text
            if i in last:
                whole.append(b"")
    assert whole.pop() == b""  # each story was ended
    whole = [story.decode() for story in whole]
    assert tally.stories == len(whole)
    return whole, tally


def write_texts(
    folder: Path, train: bytes, evaluation: bytes = b"A little cat sat down.\n<|endoftext|>\n"
) -> list[Path]:
    paths = [folder / "train.txt", folder / "eval.txt"]
    for path, raw in zip(paths, (train, evaluation), strict=True):
        path.write_bytes(raw)
    return paths


def some_text(n_stories: int) -> bytes:
    return "".join(f"{story}\n{END_OF_TEXT}\n" for story in sample_stories()["train"][:n_stories]).encode()


def run(folder: Path, train: bytes, vocab_size: int = 500) -> dict:
    return pre_tokenize(*write_texts(folder, train), folder / "out", vocab_size)


def hashes(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in OUTPUTS}


# what a story is


def test_stories_are_stripped_outside_and_untouched_inside(tmp_path):
    raw = b"\n One\r\ntwo \x00 three \n" + SEPARATOR + b"\n\n  " + SEPARATOR + b" four\t\n\n five" + SEPARATOR + b"\n"
    found, tally = read(tmp_path, raw)
    assert found == ["One\r\ntwo \x00 three", "four\t\n\n five"]
    assert (tally.empty_stories, tally.invalid_utf8) == (1, 0)


def test_a_file_without_a_separator_is_one_story_and_a_last_story_needs_none(tmp_path):
    assert read(tmp_path, b"once\nupon\n")[0] == ["once\nupon"]
    assert read(tmp_path, b"one" + SEPARATOR + b"two\n")[0] == ["one", "two"]


def test_separators_count_as_many_as_stories_and_empty_ones(tmp_path):
    raw = (b"a story" + SEPARATOR) * 5 + SEPARATOR * 3 + (b"\nanother\n" + SEPARATOR) * 2 + b"\n\n"
    found, tally = read(tmp_path, raw)
    assert raw.count(SEPARATOR) == len(found) + tally.empty_stories == 10


def test_invalid_utf8_is_replaced_and_counted_but_not_a_real_replacement_character(tmp_path):
    raw = b"caf\xc3\xa9 \xff \xe2\x82 \xef\xbf\xbd end\xe2" + SEPARATOR + b"fine"
    found, tally = read(tmp_path, raw)
    assert found == ["café \ufffd \ufffd \ufffd end\ufffd", "fine"]
    assert tally.invalid_utf8 == 3


ENCODINGS = ["UTF-16-LE", "UTF-16-BE", "UTF-32-LE", "UTF-32-BE"]


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("mark", ["\ufeff", ""])
@pytest.mark.parametrize("text", [some_text(30).decode(), "Жила-была маленькая девочка.<|endoftext|> " * 20])
def test_utf16_and_utf32_are_refused_by_name_before_any_work(tmp_path, name, mark, text):
    train, evaluation = write_texts(tmp_path, (mark + text).encode(name))
    with pytest.raises(ValueError, match=rf"train\.txt is {name}.*must be UTF-8.*iconv -f {name} -t UTF-8"):
        pre_tokenize(train, evaluation, tmp_path / "out", 300)
    assert not (tmp_path / "out").exists()


def test_a_byte_order_mark_of_utf8_is_not_part_of_the_first_story(tmp_path):
    assert read(tmp_path, "\ufeffOne<|endoftext|>Two\ufeff".encode())[0] == ["One", "Two\ufeff"]
    assert read(tmp_path, b"\xef\xbb")[1].invalid_utf8 == 1


@pytest.mark.parametrize("late", [False, True])
def test_text_that_is_hardly_utf8_stops_with_a_question_that_a_flag_answers(tmp_path, monkeypatch, late):
    latin = ("Die Bären mögen süße Äpfel.<|endoftext|>\n" * 60).encode("latin-1")
    train, evaluation = write_texts(tmp_path, some_text(10) + latin if late else latin)
    if late:
        monkeypatch.setattr(stories, "READ_BYTES", 4_000)  # the first block is good
    arguments = ["--train", train, "--eval", evaluation, "--out", tmp_path / "out", "--vocab-size", 300]
    with pytest.raises(SystemExit, match=r"train\.txt has .*invalid UTF-8.*another encoding.*--allow-invalid-utf8"):
        command.main([str(word) for word in arguments])
    assert not (tmp_path / "out" / "tinystories_tokens.json").exists()
    command.main([str(word) for word in [*arguments, "--allow-invalid-utf8"]])
    assert (tmp_path / "out" / "tinystories_tokens.json").exists()


def test_the_share_decides_for_a_small_text_too_and_a_few_errors_for_none(tmp_path):
    file = tmp_path / "train.txt"
    for text, invalid in [
        ("äöü " * 30, 90),
        ("äöü " * 3 + "ab", 9),
        ("ein Bär und " * 11, 11),
        ("Bär" + "ab " * 800, 1),
    ]:
        file.write_bytes(text.encode("latin-1"))
        if invalid > 10:
            with pytest.raises(ValueError, match=f"has {invalid} invalid UTF-8.*--allow-invalid-utf8"):
                stories.check_encoding(file)
        else:
            stories.check_encoding(file)
        stories.check_encoding(file, allow_invalid_utf8=True)
    file.write_bytes(b"\xe4" * 11 + b"a" * 2189)  # eleven of 2,200 bytes are 0.5 %
    stories.check_encoding(file)
    file.write_bytes(b"\xe4" * 11 + b"a" * 2188)
    with pytest.raises(ValueError, match="has 11 invalid"):
        stories.check_encoding(file)


def at_once(n: int, *words: object) -> list[int]:
    """The exit statuses of n processes that were started together."""
    running = [
        subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, stdout=subprocess.DEVNULL) for _ in range(n)
    ]
    return [process.wait() for process in running]


MAKE = "import sys; from llm.data.sample import make_sample; from llm.data.files import open_tokens\n"
MAKE += "folder = sys.argv[1]\nfor _ in range(int(sys.argv[2])): make_sample(folder, 400); open_tokens(folder)"


def test_several_first_runs_at_once_make_the_data_once_and_all_can_read_them(tmp_path):
    assert at_once(4, "-c", MAKE, tmp_path / "new", 1) == [0] * 4
    assert at_once(4, "-c", MAKE, tmp_path / "new", 4) == [0] * 4  # again and again, on complete data
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(
        [*OUTPUTS, "sample_train.txt", "sample_eval.txt"]
    )


@pytest.fixture
def read_only(monkeypatch):
    """As if every folder were read-only, even for root, who may write anywhere."""

    def freeze():
        def refuse(path, mode="r", *rest, **more):
            if set(mode) & set("wax+"):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return real(path, mode, *rest, **more)

        real = open
        monkeypatch.setattr("builtins.open", refuse)

    return freeze


def test_complete_data_that_are_read_only_are_accepted(tmp_path, read_only, capsys):
    make_sample(tmp_path, 400)
    read_only()
    make_sample(tmp_path, 400)
    assert capsys.readouterr().out.count("Nothing to do") == 1
    with pytest.raises(OSError, match=r"cannot write in --out"):
        make_sample(tmp_path, 401)


@pytest.mark.parametrize("read_bytes", range(1, 30))
def test_a_read_block_may_end_anywhere(tmp_path, monkeypatch, read_bytes):
    raw = "\nÉine <|endo Geschichte<|endoftext|>\n<|endoftext|>zwei€<|endoftext|> drei <|endoftext".encode()
    monkeypatch.setattr(stories, "READ_BYTES", read_bytes)
    found, tally = read(tmp_path, raw)
    assert found == ["Éine <|endo Geschichte", "zwei€", "drei <|endoftext"]
    assert tally.empty_stories == 1


@pytest.mark.parametrize("limit", [16, 64])
@pytest.mark.parametrize(
    "inside", ["words and words\n " * 40, "x" * 700, "€" * 300, " " * 500 + "far" + "\n" * 400 + "away"]
)
def test_a_long_story_passes_in_pieces_and_comes_out_whole(tmp_path, monkeypatch, limit, inside):
    monkeypatch.setattr(stories, "LONGEST_PIECE", limit)
    monkeypatch.setattr(stories, "READ_BYTES", 50)
    raw = f"  {inside}\n\n{END_OF_TEXT}next{END_OF_TEXT}".encode()
    assert read(tmp_path, raw)[0] == [inside.strip(), "next"]
    assert all(len(piece) <= 2 * limit for piece in cut(raw))


@pytest.mark.parametrize("n_blanks", [3, 20, 400])
def test_blanks_at_the_end_of_a_long_story_are_stripped_wherever_it_is_cut(tmp_path, monkeypatch, n_blanks):
    monkeypatch.setattr(stories, "LONGEST_PIECE", 16)
    monkeypatch.setattr(stories, "READ_BYTES", 10)
    raw = (b"a" * 10 + b" " * n_blanks + b"b" * 50 + b" \n" * n_blanks + SEPARATOR) * 2
    assert read(tmp_path, raw)[0] == ["a" * 10 + " " * n_blanks + "b" * 50] * 2


@pytest.mark.parametrize("length", range(30, 70))
def test_a_separator_that_has_only_begun_is_never_cut(tmp_path, monkeypatch, length):
    monkeypatch.setattr(stories, "LONGEST_PIECE", 16)
    monkeypatch.setattr(stories, "READ_BYTES", 5)
    assert read(tmp_path, b"x" * length + SEPARATOR + b"next")[0] == ["x" * length, "next"]


def test_cutting_at_white_space_changes_no_id(monkeypatch):
    monkeypatch.setattr(stories, "LONGEST_PIECE", 50)
    text = "".join(f"{story}    \n\n      " for story in sample_stories()["train"][:20]).replace(" b", "     b")
    tokenizer = train_bpe([text], 400)
    assert any(token.startswith("ĠĠĠ") for token in tokenizer.get_vocab())  # so a run of blanks cut in two would show
    pieces = cut(text.encode())
    assert len(pieces) > 100
    assert text_encoder(tokenizer)(pieces)[0].tolist() == tokenizer.encode(text).ids


# the tokenizer


@settings(max_examples=60, deadline=None)
@given(text=st.text())
def test_any_text_comes_back_from_the_tokenizer(tokenizer, text):
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert token_bytes(tokenizer)[ids].sum() == len(text.encode())
    assert encoding.encode(tokenizer, [text.encode()])[0].tolist() == ids


def test_end_of_text_in_a_text_is_ordinary_text_also_after_loading(tokenizer, tmp_path):
    tokenizer.save(str(tmp_path / "t.json"))
    for t in (tokenizer, load_tokenizer(tmp_path / "t.json")):
        ids = t.encode(f"a{END_OF_TEXT}b").ids
        assert t.token_to_id(END_OF_TEXT) not in ids
        assert t.decode(ids) == f"a{END_OF_TEXT}b"


def test_no_space_is_added_before_the_first_word(tokenizer):
    assert tokenizer.encode("the").ids != tokenizer.encode(" the").ids
    assert tokenizer.decode(tokenizer.encode("the").ids) == "the"


def test_the_vocabulary_comes_from_the_train_split_only(tmp_path):
    train, evaluation = some_text(60), b"zyzzyva zyzzyva zyzzyva zyzzyva\n" * 300
    side = pre_tokenize(*write_texts(tmp_path, train, evaluation), tmp_path / "out", 600)
    vocabulary = load_tokenizer(tmp_path / "out" / "tokenizer-bpe.json").get_vocab()
    assert side["vocab_size"] == len(vocabulary) == 600
    assert not any("zyz" in token for token in vocabulary)


def test_the_trainer_stops_reading_when_the_distinct_words_are_too_many():
    left = ([f"same word{'abcdefghij'[i % 10] * i}".encode()] for i in range(1, 1000))
    assert len(vocabulary.count_all_words(left, limit=100)) == 11  # "same" and words of 6, 7, 8 .. 15 bytes
    assert vocabulary.count_all_words([[b"same words"]] * 1000, limit=100) == {b"same": 1000, b" words": 1000}


def test_a_vocabulary_of_a_part_of_the_text_is_announced(tmp_path, monkeypatch, capsys):
    source = tmp_path / "train.txt"
    source.write_text("".join(f"word{i} again {i}\n{END_OF_TEXT}\n" for i in range(1000)), encoding="utf-8")
    vocabulary.learn_tokenizer(source, 300)
    assert "learned from the first" not in capsys.readouterr().out
    monkeypatch.setattr(vocabulary, "DISTINCT_BYTES", 100)
    monkeypatch.setattr("llm.data.stories.READ_BYTES", 1000)
    vocabulary.learn_tokenizer(source, 300)
    assert "the vocabulary is learned from the first 3.1% of train.txt" in capsys.readouterr().out


def test_load_tokenizer_names_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"pre_tokenize\.py --sample"):
        load_tokenizer(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("<html>", encoding="utf-8")
    with pytest.raises(ValueError, match=r"bad\.json is not a tokenizer file"):
        load_tokenizer(tmp_path / "bad.json")


# tokenizers, and gigatoken in its place

ODD_TEXTS = [
    "",
    "a",
    "<|endoftext|",
    "|endoftext|> <|end <|endoftext |>",
    "It's we'll I'VE you'd 'S ' s",
    "1 22 333,000 1st x86 ½ ² Ⅷ ٣",
    "two  blanks   three\n\nlines \t tab\r\nCRLF \n ",
    "no-break\u00a0blank \u2003em\u2003\u2003 \u3000wide\u0085next\u2028line\x1cfile",
    "“Curly” quotes — dashes… naïve café Zoë",
    "e\u0301 combined, ﬁ ligature, 👩\u200d👩\u200d👧 family, 🇫🇷",
    "Привет мир, 你好世界、こんにちは ยินดี שלום नमस्ते",
    "\ufffd \ufffd\ufffd \x00\x01 \x7f \ue000 \U0010ffff",
    "x" * 5000,
    "ab" * 3000 + " " * 3000 + "\n" * 100,
    "!?" * 2000 + "9" * 300,
]


def by_tokenizers(texts: list[str], vocab_size: int) -> Tokenizer:
    """Train with the trainer of `tokenizers`, on the texts themselves."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def many_words() -> list[str]:
    """Texts of 20,000 different words of few letters, so that many pairs are equally frequent."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("etaoins"), size=rng.integers(1, 9))) for _ in range(20_000)]
    return [" ".join(words[i : i + 200]) for i in range(0, len(words), 200)]


@pytest.mark.parametrize("counter", ["fast", "plain"])
@pytest.mark.parametrize(
    "texts, vocab_size",
    [(sample_stories()["train"], 10_000), (ODD_TEXTS, 600), (many_words(), 3000)],
    ids=["stories", "odd", "many words"],
)
def test_the_tokenizer_is_the_one_that_tokenizers_trains(monkeypatch, texts, vocab_size, counter):
    if counter == "plain":
        monkeypatch.setattr(encoding, "gigatoken", None)
    counts = vocabulary.count_all_words([[text.encode() for text in texts]], limit=1 << 30)
    assert make_tokenizer(counts, vocab_size).to_str() == by_tokenizers(texts, vocab_size).to_str()


@settings(max_examples=200, deadline=None)
@given(texts=st.lists(st.text(alphabet="ab c", max_size=40), max_size=5), vocab_size=st.integers(257, 330))
def test_the_merges_of_any_small_text_are_those_of_tokenizers(texts, vocab_size):
    counts = encoding.count_words([text.encode() for text in texts])
    assert make_tokenizer(counts, vocab_size).to_str() == by_tokenizers(texts, vocab_size).to_str()


def test_merges_of_a_word_by_hand():
    """low x5, lower x2: lo 7, then low 7 (by the smaller ids: l before o), e r 2 ..."""
    vocabulary, merges = learn_merges({b"low": 5, b"lower": 2, b"aaaaa": 3}, 1000, "<s>")
    assert merges[:3] == [("a", "a"), ("l", "o"), ("lo", "w")]
    assert merges[3:] == [("aa", "a"), ("aa", "aaa"), ("e", "r"), ("low", "er")]
    assert vocabulary[0] == "<s>" and vocabulary[257:260] == ["aa", "lo", "low"]


@pytest.mark.skipif(encoding.gigatoken is None, reason="gigatoken is not installed")
@pytest.mark.parametrize(
    "texts",
    [sample_stories()["train"], ODD_TEXTS, ODD_TEXTS[:1], many_words()],
    ids=["stories", "odd", "empty", "words"],
)
def test_gigatoken_gives_the_ids_of_tokenizers(texts):
    tokenizer = train_bpe([*sample_stories()["train"][:500], *ODD_TEXTS * 3], 2000)
    encoder = text_encoder(tokenizer)
    texts = [*texts, f"a{END_OF_TEXT}b {END_OF_TEXT}"]  # never parsed, should one ever get here
    ids, ends = encoder([text.encode() for text in texts])
    assert encoder.fast is not None
    for text, found in zip(texts, np.split(ids, ends), strict=False):
        assert found.tolist() == tokenizer.encode(text).ids
    assert len(ends) == len(texts) and ends[-1] == len(ids)


@pytest.mark.skipif(encoding.gigatoken is None, reason="gigatoken is not installed")
@settings(max_examples=200, deadline=None)
@given(texts=st.lists(st.text(max_size=60), min_size=1, max_size=4))
def test_any_text_is_counted_and_encoded_alike(tokenizer, texts):
    texts = [text.replace(END_OF_TEXT, "").encode() for text in texts]
    assert word_counter()(texts) == encoding.count_words(texts)
    assert all(map(np.array_equal, text_encoder(tokenizer)(texts), encoding.encode(tokenizer, texts)))


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet=st.sampled_from("aÉ1½.' \n\t\r\x0b\x1c\x85\u00a0\u2003\u3000…😀"), max_size=30))
def test_words_counted_in_parts_are_those_of_the_whole_text(text):
    assert encoding.count_words([text.encode()]) == Counter(encoding.split_words(text))


def test_without_gigatoken_the_same_files_and_one_line(tmp_path, monkeypatch, capsys):
    run(tmp_path, some_text(300))
    before = hashes(tmp_path / "out")
    (tmp_path / "out" / "tinystories_tokens.json").unlink()
    monkeypatch.setattr(encoding, "gigatoken", None)
    capsys.readouterr()
    run(tmp_path, some_text(300))
    assert hashes(tmp_path / "out") == before
    assert capsys.readouterr().out.count("gigatoken is not installed") == 1


@pytest.mark.skipif(encoding.gigatoken is None, reason="gigatoken is not installed")
def test_where_gigatoken_disagrees_on_the_first_texts_tokenizers_takes_over(tmp_path, monkeypatch, capsys):
    run(tmp_path, some_text(300))
    before = hashes(tmp_path / "out")
    (tmp_path / "out" / "tinystories_tokens.json").unlink()
    count, make = encoding.count_words_fast, encoding.fast_encoder
    monkeypatch.setattr(encoding, "count_words_fast", lambda texts: count(texts) | {b" the": 1})
    monkeypatch.setattr(encoding, "fast_encoder", lambda t: lambda texts: make(t)([*texts[:-1], texts[-1][1:]]))
    capsys.readouterr()
    run(tmp_path, some_text(300))
    assert hashes(tmp_path / "out") == before
    assert "disagree on the first texts: words are counted by tokenizers" in (printed := capsys.readouterr().out)
    assert "disagree on the first texts: texts are encoded by tokenizers" in printed


@pytest.mark.skipif(encoding.gigatoken is None, reason="gigatoken is not installed")
def test_a_character_on_which_gigatoken_disagrees_is_met_in_time(tokenizer, monkeypatch, capsys):
    """U+088F became a letter with Unicode 17, which the two need not know alike."""
    monkeypatch.setattr(encoding, "same_words", lambda *characters: "\u088f" not in characters)
    texts = [b"plain", "caf\u00e9 a\u088fb \u088f".encode()]
    encoder, calls = text_encoder(tokenizer), []
    plain = encoder.plain
    encoder.plain = lambda texts: calls.append(texts) or plain(texts)
    for block in (texts[:1], texts, texts, texts[:1]):
        assert all(map(np.array_equal, encoder(block), encoding.encode(tokenizer, block)))
    assert calls == [texts[:1], texts, texts]  # the first is the check
    assert capsys.readouterr().out.count("'\\u088f'") == 1


# the arrays


def test_arrays_hold_each_story_and_one_end_of_text_after_it(tmp_path):
    side = run(tmp_path, b"\n" + some_text(40) + SEPARATOR)
    tokens = np.load(tmp_path / "out" / "tinystories_train_tokens.npy", allow_pickle=False)
    tokenizer = load_tokenizer(tmp_path / "out" / "tokenizer-bpe.json")
    eot = side["end_of_text_id"]
    parts = np.split(tokens, np.flatnonzero(tokens == eot) + 1)
    assert parts.pop().size == 0
    assert [tokenizer.decode(part[:-1].tolist()) for part in parts] == sample_stories()["train"][:40]
    assert tokens.dtype == np.uint16 and tokens.ndim == 1
    counted = {"stories": 40, "tokens": len(tokens), "empty_stories": 1, "invalid_utf8": 0}
    assert counted.items() <= side["train"].items()
    assert side["train"]["story_bytes"] == sum(len(story.encode()) for story in sample_stories()["train"][:40])
    assert side["files"][0]["sha256"] == hashes(tmp_path / "out")["tokenizer-bpe.json"]


def test_a_story_cut_in_pieces_gets_one_end_of_text(tmp_path, monkeypatch):
    monkeypatch.setattr(stories, "LONGEST_PIECE", 100)
    monkeypatch.setattr(stories, "READ_BYTES", 500)  # pieces of one story fall into several blocks
    side = run(tmp_path, b"word " * 500 + SEPARATOR + b"y" * 1000)
    tokens = np.load(tmp_path / "out" / "tinystories_train_tokens.npy")
    assert side["train"]["stories"] == 2
    assert np.flatnonzero(tokens == side["end_of_text_id"]).size == 2 and tokens[-1] == side["end_of_text_id"]


def test_a_vocabulary_beyond_65536_takes_a_wider_dtype(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(tokenize, "token_bytes", lambda t: np.resize(token_bytes(tokenizer), 70_000))
    (source,) = write_texts(tmp_path, some_text(3))[:1]
    tokenize.write_tokens(source, tmp_path / "wide.npy", tokenizer, text_encoder(tokenizer))
    assert np.load(tmp_path / "wide.npy").dtype == np.uint32


def test_an_id_outside_the_vocabulary_is_never_written(tmp_path, monkeypatch):
    strange = np.array([70_000], np.uint32), np.array([1])
    monkeypatch.setattr(tokenize, "text_encoder", lambda t: lambda texts: strange)
    with pytest.raises(ValueError, match="does not give back the text"):
        run(tmp_path, some_text(3))
    assert not (tmp_path / "out" / "tinystories_train_tokens.npy").exists()


def test_a_tokenizer_that_loses_a_byte_is_noticed(tmp_path, monkeypatch):
    def lossy(tokenizer):
        return lambda texts: encoding.encode(tokenizer, [text[:-1] for text in texts])

    monkeypatch.setattr(tokenize, "text_encoder", lossy)
    with pytest.raises(ValueError, match="does not give back the text"):
        run(tmp_path, some_text(3))


def test_a_second_run_does_nothing_until_something_changes(tmp_path, capsys):
    run(tmp_path, some_text(20))
    out, before = tmp_path / "out", hashes(tmp_path / "out")
    times = [(out / name).stat().st_mtime_ns for name in OUTPUTS]
    run(tmp_path, some_text(20))
    assert "Nothing to do" in capsys.readouterr().out
    assert times == [(out / name).stat().st_mtime_ns for name in OUTPUTS]

    damaged = bytearray((out / "tinystories_train_tokens.npy").read_bytes())
    damaged[200] ^= 1
    (out / "tinystories_train_tokens.npy").write_bytes(damaged)
    run(tmp_path, some_text(20))
    assert hashes(out) == before  # the damage was seen and mended

    run(tmp_path, some_text(21))
    assert hashes(out) != before


def test_the_table_and_what_was_odd_are_reported(tmp_path, capsys):
    run(tmp_path, some_text(5) + SEPARATOR + b"\xff" + SEPARATOR)
    printed = capsys.readouterr().out
    assert "bytes/token" in printed and "MB/s" in printed
    assert "1 empty stories dropped" in printed and "1 invalid UTF-8" in printed


# faults


def test_bad_input_is_refused_before_any_work(tmp_path):
    train, evaluation = write_texts(tmp_path, some_text(3))
    with pytest.raises(FileNotFoundError, match=r"(?s)download\.sh.*--train my\.txt.*--sample"):
        pre_tokenize(tmp_path / "none.txt", evaluation, tmp_path / "out")
    with pytest.raises(ValueError, match="same file"):
        pre_tokenize(train, train, tmp_path / "out")
    with pytest.raises(ValueError, match="--vocab-size 256 is too small"):
        pre_tokenize(train, evaluation, tmp_path / "out", 256)
    with pytest.raises(OSError, match="cannot write in --out"):
        pre_tokenize(train, evaluation, train / "below_a_file")
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match=r"--eval .*empty\.txt is empty"):
        pre_tokenize(train, tmp_path / "empty.txt", tmp_path / "out")
    (tmp_path / "blank.txt").write_bytes(b"\n \n" + SEPARATOR)
    with pytest.raises(ValueError, match="holds no story"):
        pre_tokenize(train, tmp_path / "blank.txt", tmp_path / "out")


def test_the_command_prints_one_line_and_fails(tmp_path):
    with pytest.raises(SystemExit, match=r"none\.txt not found"):
        command.main(["--train", str(tmp_path / "none.txt"), "--out", str(tmp_path)])


def test_the_command_makes_the_sample(tmp_path, capsys):
    command.main(["--sample", "--out", str(tmp_path)])
    assert all((tmp_path / name).is_file() for name in OUTPUTS)
    before = hashes(tmp_path)
    (tmp_path / "sample_train.txt").write_bytes(b"something else")
    assert make_sample(tmp_path) == tmp_path
    assert hashes(tmp_path) == before


def test_the_sample_is_varied_and_its_splits_are_disjoint():
    sample = sample_stories()
    assert sample == sample_stories()
    assert not set(sample["train"]) & set(sample["eval"])
    assert len(set(sample["train"])) == len(sample["train"])
    size = sum(len(story) for story in sample["train"] + sample["eval"])
    assert 1.9e6 < size < 2.3e6
    assert not any(mark in story for story in sample["train"] for mark in "[]{}|\\")


def test_a_full_disk_leaves_no_array_that_looks_whole(tmp_path, monkeypatch):
    calls = []

    def full_at_the_second_block(tokenizer):
        def encode(texts):
            calls.append(1)
            if len(calls) == 2:
                raise OSError(errno.ENOSPC, "No space left on device")
            return encoding.encode(tokenizer, texts)

        return encode

    monkeypatch.setattr(stories, "READ_BYTES", 5_000)
    monkeypatch.setattr(tokenize, "text_encoder", full_at_the_second_block)
    with pytest.raises(OSError, match=r"disk full: .* needs about .* MB and has .* MB free"):
        run(tmp_path, some_text(40))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["tokenizer-bpe.json"]


def test_a_file_size_limit_hit_while_writing(tmp_path):
    """The kernel's own refusal, which may come as late as the flush."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    train, evaluation = write_texts(tmp_path, some_text(400))
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limit[1]))
        with pytest.raises(OSError, match="disk full"):
            pre_tokenize(train, evaluation, tmp_path / "out", 300)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["tokenizer-bpe.json"]


def test_too_little_free_space_is_seen_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenize.shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(OSError, match="disk full"):
        run(tmp_path, some_text(3))
    assert list((tmp_path / "out").iterdir()) == []


def kill_and_rerun(tmp_path: Path, n_stories: int, delays) -> None:
    """Kill pre_tokenize.py -9 after each delay, or while it writes an array (None); then compare with a clean run."""
    train, evaluation = write_texts(tmp_path, some_text(n_stories))
    pre_tokenize(train, evaluation, tmp_path / "clean", 2_000)
    out = tmp_path / "killed"
    arguments = ["--train", str(train), "--eval", str(evaluation), "--out", str(out), "--vocab-size", "2000"]
    for delay in delays:
        process = subprocess.Popen([sys.executable, str(ROOT / "pre_tokenize.py"), *arguments], cwd=ROOT)
        if delay is None:
            while process.poll() is None and not list(out.glob("*.npy.*.tmp")):
                time.sleep(0.001)
        else:
            time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (out / "tinystories_tokens.json").exists() or hashes(out) == hashes(tmp_path / "clean")
    command.main(arguments)
    assert hashes(out) == hashes(tmp_path / "clean")
    assert not list(out.glob("*.tmp"))


def test_kill_9_while_an_array_is_written(tmp_path):
    kill_and_rerun(tmp_path, 3_000, [None])


@pytest.mark.slow
def test_kill_9_twenty_times(tmp_path):
    kill_and_rerun(tmp_path, 3_450, np.random.default_rng(0).uniform(0.3, 4, size=20))


@pytest.mark.slow
@pytest.mark.parametrize("text", ["no blank", "no newline"])
def test_200_mb_in_one_story_stay_within_1500_mb(tmp_path, text):
    rng = np.random.default_rng(0)
    train, evaluation = write_texts(tmp_path, b"")
    with open(train, "wb") as file:
        for _ in range(200):
            letters = rng.integers(97, 123, size=10**6, dtype=np.uint8)
            if text == "no newline":
                letters[rng.random(10**6) < 0.12] = 32
            file.write(letters.tobytes())
    code = (
        "import resource, sys, pre_tokenize; pre_tokenize.main(sys.argv[1:]); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    )
    arguments = ["--train", str(train), "--eval", str(evaluation), "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert int(done.stdout.split()[-1]) < 1500
    assert json.loads((tmp_path / "tinystories_tokens.json").read_text(encoding="utf-8"))["train"]["stories"] == 1
