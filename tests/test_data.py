"""Reading token arrays: nothing damaged is opened; every window of an epoch is seen once, on any number of ranks."""

import json
import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch

from llm.data import files
from llm.data import windows as windows_module
from llm.data.files import load_tokenizer, map_tokens, open_tokens, token_bytes
from llm.data.sample import sample_stories
from llm.data.tokenize import pre_tokenize
from llm.data.windows import count_windows, eval_windows, step_batches, windows
from llm.files import sha256
from llm.training.device import Machine

SIDE = "tinystories_tokens.json"
TRAIN = "tinystories_train_tokens.npy"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    for split, stories in sample_stories().items():
        text = "<|endoftext|>\n".join(story + "\n" for story in stories[:60])
        (folder / f"{split}.txt").write_text(text, encoding="utf-8", newline="")
    pre_tokenize(folder / "train.txt", folder / "eval.txt", folder, 400)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "data")


def rewrite(folder, tokens) -> None:
    """Write other train tokens and make the side file agree, as someone who made the arrays himself would."""
    np.save(folder / TRAIN, tokens)
    side = json.loads((folder / SIDE).read_text(encoding="utf-8"))
    recorded = next(file for file in side["files"] if file["name"] == TRAIN)
    recorded |= {"bytes": (folder / TRAIN).stat().st_size, "sha256": sha256(folder / TRAIN)}
    (folder / SIDE).write_text(json.dumps(side), encoding="utf-8")


# opening


def test_open_tokens_gives_what_was_written(folder):
    data = open_tokens(folder)
    tokenizer = load_tokenizer(data.tokenizer_path)
    assert isinstance(data.train, np.memmap) and data.train.dtype == np.uint16 and not data.train.flags.writeable
    assert (data.vocab_size, data.eot) == (400, tokenizer.token_to_id("<|endoftext|>"))
    assert data.tokenizer_sha256 == sha256(data.tokenizer_path)
    assert data.train_sha256 == sha256(folder / TRAIN)
    first = data.train[: int(np.argmax(data.train == data.eot))]
    assert tokenizer.decode(first.tolist()) == sample_stories()["train"][0]


def test_missing_data_name_the_three_ways(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"(?s)download\.sh.*--train my\.txt.*--sample"):
        open_tokens(tmp_path)


@pytest.mark.parametrize("name", [TRAIN, "tokenizer-bpe.json"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name} is missing.*python pre_tokenize\.py"):
        open_tokens(folder)


def test_a_truncated_array_is_refused(folder):
    raw = (folder / TRAIN).read_bytes()
    (folder / TRAIN).write_bytes(raw[:-2])
    with pytest.raises(ValueError, match=rf"{TRAIN} has {len(raw) - 2:,} bytes and should have {len(raw):,}"):
        open_tokens(folder)


@pytest.mark.parametrize("name", [TRAIN, "tinystories_eval_tokens.npy", "tokenizer-bpe.json"])
def test_a_flipped_bit_is_refused(folder, name):
    raw = bytearray((folder / name).read_bytes())
    raw[len(raw) // 2] ^= 1
    (folder / name).write_bytes(raw)
    with pytest.raises(ValueError, match=rf"{name} was changed after it was written"):
        open_tokens(folder)


@pytest.mark.parametrize("text", ["", "<html>", "[]", '{"vocab_size": 10}'])
def test_a_damaged_side_file_is_refused(folder, text):
    (folder / SIDE).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"{SIDE} is damaged"):
        open_tokens(folder)


def test_an_id_outside_the_vocabulary_is_found_with_its_offset(folder, monkeypatch):
    monkeypatch.setattr(files, "CHECKED_AT_ONCE", 100)
    tokens = np.array(open_tokens(folder).train)
    tokens[1234], tokens[1290] = 500, 65_535
    rewrite(folder, tokens)
    with pytest.raises(ValueError, match=r"id 500 >= vocabulary 400 at offset 1,234"):
        open_tokens(folder)


@pytest.mark.parametrize("tokens", [np.zeros(50, np.int16), np.zeros((50, 2), np.uint16), np.zeros(50, np.float32)])
def test_another_dtype_or_shape_is_refused(folder, tokens):
    rewrite(folder, tokens)
    with pytest.raises(ValueError, match="not one row of unsigned ids"):
        open_tokens(folder)


def test_an_array_of_objects_is_not_unpickled(folder):
    np.save(folder / "objects.npy", np.array([{}], dtype=object))
    (folder / "objects.npy").rename(folder / TRAIN)
    with pytest.raises(ValueError, match=r"allow_pickle=False|Array can't be memory-mapped"):
        map_tokens(folder / TRAIN, 400)


# windows

T, N = 7, 23
TOKENS = np.arange(N * T + 5, dtype=np.uint16)  # token = offset, so a window tells where it comes from


def test_every_window_of_an_epoch_comes_once_and_each_epoch_has_its_own_order():
    stream = windows(TOKENS, T, seed=3, start=0, count=3 * N)
    assert stream.dtype == np.int64 and stream.shape == (3 * N, T + 1)
    assert (stream == stream[:, :1] + np.arange(T + 1)).all()  # neighbours in the text: targets are inputs moved by one
    starts = stream[:, 0].reshape(3, N)
    for epoch in starts:
        assert sorted(epoch) == [i * T for i in range(N)]
    assert len({tuple(epoch) for epoch in starts}) == 3


def test_the_stream_depends_on_the_seed_and_on_nothing_else():
    first = windows(TOKENS, T, seed=0, start=0, count=N)
    assert not (first == windows(TOKENS, T, seed=1, start=0, count=N)).all()
    torch.manual_seed(7)
    np.random.seed(7)
    windows(TOKENS, T, seed=5, start=90, count=4)
    assert (first == windows(TOKENS, T, seed=0, start=0, count=N)).all()
    part = windows(TOKENS, T, seed=0, start=N - 3, count=6)  # reaches into the next epoch
    assert (part == windows(TOKENS, T, seed=0, start=0, count=2 * N)[N - 3 : N + 3]).all()


def test_the_last_token_that_fills_a_window_is_used_and_too_few_are_refused():
    assert count_windows(np.arange(2 * T + 1), T) == 2
    assert count_windows(np.arange(2 * T), T) == 1
    assert windows(np.arange(T + 1), T, 0, 0, 1).tolist() == [list(range(T + 1))]
    with pytest.raises(ValueError, match=r"hold 7 tokens, and one window of 7 needs 8.*--model\.max-seq-len"):
        windows(np.arange(T), T, 0, 0, 1)
    with pytest.raises(ValueError, match="one window"):
        eval_windows(np.arange(T), T, 1)


@pytest.mark.parametrize("n_windows", [1, 5, N, 1000])
def test_eval_windows_are_spread_over_the_text_without_a_common_target(n_windows):
    chosen = eval_windows(TOKENS, T, n_windows)
    starts = chosen[:, 0].tolist()
    assert chosen.dtype == torch.int64 and len(chosen) == min(n_windows, N)
    assert torch.equal(chosen, chosen[:, :1] + torch.arange(T + 1))
    gaps = [b - a for a, b in pairwise(starts)]
    assert all(gap >= T for gap in gaps) and max(gaps, default=0) - min(gaps, default=0) <= T
    assert starts[-1] >= (N - N / len(starts) - 1) * T
    assert chosen[:, 1:].unique().numel() == chosen[:, 1:].numel()


# batches


def batches(**changes) -> list[list[tuple[int, torch.Tensor]]]:
    settings = dict(seq_len=T, micro_batch_size=2, windows_per_step=8, seed=4, first_step=0, last_step=6)
    return list(step_batches(TOKENS, **(settings | changes)))


def same(a, b) -> bool:
    return len(a) == len(b) and all(
        i == j and torch.equal(x, y)
        for one, other in zip(a, b, strict=True)
        for (i, x), (j, y) in zip(one, other, strict=True)
    )


def test_a_step_takes_its_part_of_the_stream():
    steps = batches()
    assert [[j for j, _ in step] for step in steps] == [[0, 1, 2, 3]] * 6
    rows = torch.cat([rows for step in steps for _, rows in step])
    assert torch.equal(rows, torch.from_numpy(windows(TOKENS, T, seed=4, start=0, count=48)))
    assert same(steps, batches())
    assert not same(steps, batches(seed=5))


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_ranks_together_read_what_one_rank_reads(world_size):
    ranks = [batches(rank=rank, world_size=world_size) for rank in range(world_size)]
    joined = [sorted((m for rank in ranks for m in rank[s]), key=lambda m: m[0]) for s in range(6)]
    assert same(joined, batches())
    assert {len(rank[0]) for rank in ranks} == {4 // world_size}


def test_resuming_at_a_step_reads_on_from_there():
    assert same(batches(first_step=4), batches()[4:])
    assert batches(first_step=6) == []


def test_a_batch_that_does_not_divide_is_refused_at_once():
    with pytest.raises(ValueError, match=r"8 windows per step .* 3 ranks .*--tokens-per-step must be a multiple of 42"):
        step_batches(
            TOKENS, seq_len=T, micro_batch_size=2, windows_per_step=8, seed=0, first_step=0, last_step=1, world_size=3
        )


def test_the_next_step_is_prepared_meanwhile_and_no_more_than_one(monkeypatch):
    asked = []
    real = windows
    monkeypatch.setattr(windows_module, "windows", lambda *a: asked.append(a[3]) or real(*a))
    steps = step_batches(TOKENS, seq_len=T, micro_batch_size=8, windows_per_step=8, seed=0, first_step=0, last_step=9)
    next(steps)
    next(steps)
    steps.close()  # waits for what is under way
    assert asked == [0, 8, 16]


def test_what_fails_in_the_thread_is_raised_to_the_caller(monkeypatch):
    def fail(*arguments):
        raise OSError("the disk went away")

    monkeypatch.setattr(windows_module, "windows", fail)
    with pytest.raises(OSError, match="the disk went away"):
        batches()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_arrive_on_the_gpu():
    to_device = Machine(torch.device("cuda"), bf16=True, compile=False).to_device
    there = batches(to_device=to_device)
    assert all(rows.is_cuda for step in there for _, rows in step)
    assert same([[(j, rows.cpu()) for j, rows in step] for step in there], batches())


# bits per byte


def test_token_bytes_add_up_to_the_text(whole):
    data = open_tokens(whole)
    n_bytes = token_bytes(data.tokenizer_path)
    assert n_bytes.dtype == np.int64 and n_bytes.shape == (data.vocab_size,) and n_bytes[data.eot] == 0
    text_bytes = sum(len(story.encode()) for story in sample_stories()["eval"][:60])
    assert n_bytes[data.eval].sum() == text_bytes


def test_token_bytes_of_some_windows_are_the_bytes_of_their_text(whole):
    data = open_tokens(whole)
    targets = eval_windows(data.eval, 16, 8)[:, 1:]
    tokenizer = load_tokenizer(data.tokenizer_path)  # the sample stories are ASCII: no character is cut in two
    decoded = sum(len(tokenizer.decode(row, skip_special_tokens=True).encode()) for row in targets.tolist())
    assert token_bytes(tokenizer)[targets].sum() == decoded
