"""Checkpoints: what is saved comes back bit by bit, and no kill, full disk or damaged byte gets past them."""

import json
import multiprocessing
import os
import resource
import shutil

import numpy as np
import pytest
import torch
from torch import nn

from llm.training import checkpoint
from llm.training.checkpoint import (
    CheckpointError,
    best_checkpoint,
    find_checkpoints,
    load_model_weights,
    load_training_state,
    newest_good,
    save_checkpoint,
    verify_checkpoint,
)
from llm.training.resume import check_same_run

CONFIG = {
    "model_name": "baseline",
    "model": {"d_model": 6, "layer_types": ("local", "global")},
    "data": {"vocab_size": 11, "tokenizer_sha256": "aa", "path": "data/sample"},
    "train": {"seed": 0, "tokens_per_step": 64, "device": "cpu"},
}


def make_model(width=6, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(width, width), nn.Linear(width, 3))


def train(model, optimizer, steps):
    for step in range(steps):
        torch.manual_seed(step)
        model(torch.randn(4, 6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def save(folder, step, model=None, *, best=False, state=None, tokenizer=None, optimizer_state=None):
    return save_checkpoint(
        folder,
        step=step,
        weights=(model or make_model(seed=step)).state_dict(),
        optimizer_state=optimizer_state or {},
        state=state or {"tokens": 64 * step},
        config=CONFIG,
        tokenizer=tokenizer,
        keep_best=best,
    )


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def flip_a_byte(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_everything_comes_back_bit_by_bit_and_training_goes_on_the_same(tmp_path):
    straight = make_model()
    optimizer = torch.optim.AdamW(straight.parameters(), lr=0.1)
    train(straight, optimizer, 3)
    tokenizer = tmp_path / "vocabulary.json"
    tokenizer.write_text('{"é": 1}', encoding="utf-8")
    state = {"tokens": 192, "eval_loss": 1.5, "seen": (1, 2), "windows": torch.arange(3)}
    path = save(
        tmp_path / "my runs ü" / "checkpoints",
        3,
        straight,
        state=state,
        tokenizer=tokenizer,
        optimizer_state=optimizer.state_dict(),
    )
    assert names(path) == [
        "config.json",
        "manifest.json",
        "model.safetensors",
        "tokenizer-bpe.json",
        "training_state.pt",
    ]
    assert verify_checkpoint(path)["step"] == 3
    assert (path / "tokenizer-bpe.json").read_bytes() == tokenizer.read_bytes()
    assert json.loads((path / "config.json").read_text(encoding="utf-8")) == json.loads(json.dumps(CONFIG))

    resumed = make_model(seed=99)
    load_model_weights(path, resumed)
    saved = load_training_state(path)
    again = torch.optim.AdamW(resumed.parameters(), lr=0.1)
    again.load_state_dict(saved["optimizer_state"])
    assert saved["step"] == 3
    assert torch.equal(saved["state"].pop("windows"), torch.arange(3))
    assert saved["state"] == {"tokens": 192, "eval_loss": 1.5, "seen": (1, 2)}
    train(straight, optimizer, 4)
    train(resumed, again, 4)
    for one, other in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_shared_and_non_contiguous_weights_are_saved_plain(tmp_path):
    model = make_model()
    model[0].weight = nn.Parameter(model[0].weight.detach().T)
    model.append(model[0])  # two names for one tensor, which safetensors alone refuses
    path = save(tmp_path, 1, model)
    other = make_model(seed=5)
    other.append(other[0])
    load_model_weights(path, other)
    assert torch.equal(other[0].weight, model[0].weight) and torch.equal(other[1].weight, model[1].weight)


def test_a_state_that_could_not_be_loaded_again_is_not_saved(tmp_path):
    with pytest.raises(CheckpointError, match=r"\['state'\]\['history'\]\[1\] is a float64"):
        save(tmp_path, 1, state={"history": [1.0, np.float64(2.0)]})
    assert names(tmp_path) == []


def test_the_newest_two_and_the_best_are_kept(tmp_path):
    for step in range(1, 11):
        save(tmp_path, step, best=step in (2, 4))
    assert names(tmp_path) == ["step-000004", "step-000009", "step-000010"]
    assert best_checkpoint(tmp_path).name == "step-000004"
    save(tmp_path, 11, best=True)
    save(tmp_path, 11)  # a final save of the step that was best
    assert names(tmp_path) == ["step-000010", "step-000011"]
    assert best_checkpoint(tmp_path).name == "step-000011"


def test_a_failed_deletion_only_warns_and_is_made_up_for(tmp_path, monkeypatch, capsys):
    for step in (1, 2):
        save(tmp_path, step)

    def refuse(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError("device busy")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refuse)
        save(tmp_path, 3)
    assert "step-000001 was not removed: device busy" in capsys.readouterr().out
    assert [path.name for path in find_checkpoints(tmp_path)] == ["step-000002", "step-000003"]
    save(tmp_path, 4)
    assert names(tmp_path) == ["step-000003", "step-000004"]


def test_after_going_back_later_checkpoints_are_set_aside_and_never_resumed(tmp_path, capsys):
    for step in (10, 20):
        save(tmp_path, step)
    save(tmp_path, 12)
    assert names(tmp_path) == ["abandoned-step-000020", "step-000010", "step-000012"]
    assert newest_good(tmp_path).name == "step-000012"
    assert "abandoned-step-000020 is later" in capsys.readouterr().out


def save_and_die(folder, step, function, call):
    """A save that is killed where `function` is called for the `call`-th time; os._exit runs no clean-up either."""
    module, name = function
    original, calls = getattr(module, name), []

    def deadly(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            os._exit(9)
        return original(*args, **kwargs)

    setattr(module, name, deadly)
    save(folder, step, make_model(seed=7))


SEAL, RENAME, DELETE = (checkpoint, "seal"), (os, "replace"), (shutil, "rmtree")


@pytest.mark.parametrize(
    ("step", "function", "call", "good", "written_by"),
    [
        (6, SEAL, 1, "step-000005", 5),
        (6, RENAME, 1, "step-000005", 5),
        (6, DELETE, 1, "step-000006", 7),
        (6, RENAME, 2, "step-000006", 7),  # the oldest, on its way to deletion
        (6, DELETE, 2, "step-000006", 7),
        (5, SEAL, 1, "step-000005", 5),  # a step that is saved again
        (5, RENAME, 1, "step-000005", 5),
        (5, RENAME, 2, "step-000005.replaced", 5),
        (5, DELETE, 1, "step-000005", 7),
    ],
)
def test_kill_during_a_save_leaves_a_good_checkpoint(tmp_path, step, function, call, good, written_by):
    save(tmp_path, 4)
    save(tmp_path, 5)
    child = multiprocessing.get_context("fork").Process(target=save_and_die, args=(tmp_path, step, function, call))
    child.start()
    child.join()
    assert child.exitcode == 9
    assert newest_good(tmp_path).name == good
    model = make_model(seed=1)
    load_model_weights(newest_good(tmp_path), model)
    assert torch.equal(model[0].weight, make_model(seed=written_by)[0].weight)
    save(tmp_path, 8)
    assert names(tmp_path) == [good.removesuffix(".replaced"), "step-000008"]


@pytest.mark.parametrize("writer", ["weights", "training state", "tokenizer"])
def test_disk_full_says_so_and_leaves_the_earlier_ones_alone(tmp_path, writer):
    """RLIMIT_FSIZE makes each write past the limit fail like a full disk; safetensors, torch and Python report it each
    in its own way."""
    folder, tokenizer = tmp_path / "checkpoints", tmp_path / "tokenizer.json"
    save(folder, 1)
    tokenizer.write_text(" " * (200_000 if writer == "tokenizer" else 1))
    model = make_model(200 if writer == "weights" else 6)
    state = {"big": torch.zeros(30_000 if writer == "training state" else 1)}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"disk full: step-000002 needs about 0\.\d MB, [\d,.]+ MB free at"):
            save(folder, 2, model, state=state, tokenizer=tokenizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(folder) == ["step-000001"]
    verify_checkpoint(folder / "step-000001")


def test_a_folder_that_refuses_is_not_called_a_full_disk(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot save .*step-000001.*--out"):
        save(tmp_path / "file" / "checkpoints", 1)


def truncate(file):
    os.truncate(file, file.stat().st_size // 2)


DAMAGE = {
    "truncated": (truncate, r"expected \d+ bytes, found \d+"),
    "flipped byte": (flip_a_byte, r"expected [0-9a-f]{64} as SHA-256, found [0-9a-f]{64}|is damaged"),
    "empty": (lambda file: file.write_bytes(b""), r"expected \d+ bytes, found 0"),
    "web page": (lambda file: file.write_text("<html>404</html>"), r"expected \d+ bytes, found 16"),
    "missing": (os.remove, r"is missing"),
}


@pytest.mark.parametrize("file", ["model.safetensors", "training_state.pt", "config.json", "manifest.json"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_refused_and_skipped(tmp_path, capsys, damage, file):
    for step in (1, 2):
        save(tmp_path, step)
    spoil, message = DAMAGE[damage]
    spoil(tmp_path / "step-000002" / file)
    if file == "manifest.json":
        message = r"manifest.json is (damaged|missing)"
    with pytest.raises(CheckpointError, match=message) as error:
        verify_checkpoint(tmp_path / "step-000002")
    assert file in str(error.value) and "there: step-000001" in str(error.value)
    assert newest_good(tmp_path).name == "step-000001"
    assert capsys.readouterr().out.count("warning: skipped step-000002") == 1
    spoil(tmp_path / "step-000001" / file)
    with pytest.raises(CheckpointError, match=r"all 2 checkpoints in .* are damaged"):
        newest_good(tmp_path)


def test_every_flipped_byte_of_a_manifest_is_noticed(tmp_path):
    path = save(tmp_path, 1)
    manifest = (path / "manifest.json").read_bytes()
    for position in [index for index, byte in enumerate(manifest) if not chr(byte).isspace()]:
        spoiled = bytearray(manifest)
        spoiled[position] ^= 1
        (path / "manifest.json").write_bytes(spoiled)
        with pytest.raises(CheckpointError):
            verify_checkpoint(path)


def test_what_is_no_checkpoint_is_refused_in_words(tmp_path):
    assert newest_good(tmp_path / "nowhere") is None
    (tmp_path / "page.html").write_text("<html>")
    (tmp_path / "empty").mkdir()
    for name, message in [("page.html", "a file, not a folder"), ("gone", "not there"), ("empty", "is missing")]:
        with pytest.raises(CheckpointError, match=message):
            verify_checkpoint(tmp_path / name)


class Payload:
    """Unpickled, it would create a file."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return (open, (self.file, "w"))


@pytest.mark.parametrize("content", ["empty", "web page", "payload", "payload in a legacy file"])
def test_a_training_state_never_runs_code_nor_advises_to(tmp_path, content):
    path, victim = save(tmp_path, 1), tmp_path / "victim"
    if content.startswith("payload"):
        new_format = content == "payload"
        torch.save({"state": Payload(victim)}, path / "training_state.pt", _use_new_zipfile_serialization=new_format)
    else:
        (path / "training_state.pt").write_text("" if content == "empty" else "<html>404</html>")
    with pytest.raises(CheckpointError, match="was refused") as error:
        load_training_state(path)
    assert "weights_only" not in str(error.value)
    assert error.value.__cause__ is None and error.value.__suppress_context__  # nor in a traceback
    assert not victim.exists()


def test_another_model_is_refused_by_name(tmp_path):
    path = save(tmp_path, 1)
    for model, message in [
        (nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3), nn.Linear(3, 2)), r"2 missing: 2\.bias; 2\.weight"),
        (nn.Sequential(nn.Linear(6, 6)), r"2 left over: 1\.bias; 1\.weight"),
        (make_model(7), r"3 of another shape: 0\.bias \(6,\), not \(7,\)"),
    ]:
        before = [parameter.clone() for parameter in model.parameters()]
        with pytest.raises(CheckpointError, match=message):
            load_model_weights(path, model)
        assert all(map(torch.equal, before, model.parameters()))
    (path / "model.safetensors").write_text("<html>404</html>")
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        load_model_weights(path, make_model())


def changed(section, **values):
    return CONFIG | {section: CONFIG[section] | values}


def test_a_run_goes_on_only_as_the_same_run():
    saved = json.loads(json.dumps(CONFIG))
    check_same_run(saved, CONFIG)
    check_same_run(saved, changed("train", device="cuda"))
    check_same_run(saved, changed("data", path="/elsewhere"))
    for other, field, was, given in [
        (CONFIG | {"model_name": "llama"}, "model_name", '"baseline"', '"llama"'),
        (changed("model", d_model=8), "model.d_model", "6", "8"),
        (changed("model", n_kv_heads=2), "model.n_kv_heads", "nothing", "2"),
        (changed("data", tokenizer_sha256="bb"), "data.tokenizer_sha256", '"aa"', '"bb"'),
        (changed("data", vocab_size=12), "data.vocab_size", "11", "12"),
        (changed("train", seed=1), "train.seed", "0", "1"),
    ]:
        with pytest.raises(CheckpointError) as error:
            check_same_run(saved, other)
        assert f"  {field}: saved {was}, given {given}\n" in str(error.value)
        assert str(error.value).count("\n  ") == 1
