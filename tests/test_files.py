"""A file is replaced whole or not at all, by one process or by several, and whatever kills them."""

import multiprocessing
import os

import pytest

from llm.files import fingerprint, replacing, replacing_folder, sha256, tensor_problems, waiting_lock, write_atomically


def test_readers_see_the_old_content_until_the_new_is_whole(tmp_path):
    target = tmp_path / "config.json"
    write_atomically(target, b"old")
    with replacing(target) as file:
        file.write(b"new, and longer")
        assert target.read_bytes() == b"old"
    assert target.read_bytes() == b"new, and longer"
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_an_error_leaves_the_old_content_and_nothing_else(tmp_path):
    target = tmp_path / "config.json"
    write_atomically(target, b"old")
    with pytest.raises(RuntimeError), replacing(target) as file:
        file.write(b"half of the n")
        raise RuntimeError
    assert target.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_permissions_are_those_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    write_atomically(tmp_path / "replaced", b"")
    assert (tmp_path / "replaced").stat().st_mode == (tmp_path / "plain").stat().st_mode


def write_and_wait(target, written, go_on):
    with replacing(target) as file:
        file.write(b"first")
        written.set()
        go_on.wait()


def test_two_processes_may_write_the_same_file_and_a_killed_one_leaves_nothing(tmp_path):
    fork, target = multiprocessing.get_context("fork"), tmp_path / "tokens.npy"
    for killed in (False, True):
        written, go_on = fork.Event(), fork.Event()
        other = fork.Process(target=write_and_wait, args=(target, written, go_on))
        other.start()
        written.wait()
        write_atomically(target, b"second")
        assert target.read_bytes() == b"second" and len(list(tmp_path.iterdir())) == 2
        other.kill() if killed else go_on.set()
        other.join()
        assert target.read_bytes() == (b"second" if killed else b"first")
    write_atomically(target, b"third")
    assert os.listdir(tmp_path) == ["tokens.npy"]


def write_often(target, n):
    for _ in range(n):
        write_atomically(target, b"content")


def test_many_writers_of_one_file_never_take_a_new_file_for_a_leftover(tmp_path):
    fork, target = multiprocessing.get_context("fork"), tmp_path / "tokens.npy"
    writers = [fork.Process(target=write_often, args=(target, 150)) for _ in range(6)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * 6
    assert os.listdir(tmp_path) == ["tokens.npy"]


def test_a_waiting_lock_is_held_by_one_process_at_a_time_and_leaves_nothing(tmp_path):
    fork, inside = multiprocessing.get_context("fork"), tmp_path / "inside"

    def work():
        for _ in range(30):
            with waiting_lock(tmp_path / "lock"):
                inside.touch(exist_ok=False)
                inside.unlink()

    workers = [fork.Process(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert os.listdir(tmp_path) == []


def fill(target, content, ready, go_on):
    with replacing_folder(target) as folder:
        (folder / "a").write_text(content)
        ready.set()
        go_on.wait()
        (folder / "b").write_text(content)


def test_several_processes_may_write_one_folder_and_the_first_to_end_wins(tmp_path):
    fork, target = multiprocessing.get_context("fork"), tmp_path / "out"
    target.mkdir()  # an empty one may be there
    (tmp_path / "out.tmp").mkdir()  # of the user
    ready, go_on = [fork.Event() for _ in range(3)], [fork.Event() for _ in range(3)]
    writers = [fork.Process(target=fill, args=(target, str(i), ready[i], go_on[i])) for i in range(3)]
    for writer, event in zip(writers, ready, strict=True):
        writer.start()
        event.wait()
    for i in (1, 0):
        go_on[i].set()
        writers[i].join()
    assert [writer.exitcode for writer in writers[:2]] == [1, 0]
    assert {path.name: path.read_text() for path in target.iterdir()} == {"a": "1", "b": "1"}
    writers[2].kill()
    writers[2].join()
    assert len(list(tmp_path.iterdir())) == 4  # with a folder and a file of the killed one
    with pytest.raises(OSError, match="not empty"), replacing_folder(target) as folder:
        (folder / "a").write_text("3")
    assert sorted(os.listdir(tmp_path)) == ["out", "out.tmp"] and (target / "b").read_text() == "1"


def test_an_error_leaves_no_folder(tmp_path):
    with pytest.raises(RuntimeError), replacing_folder(tmp_path / "new" / "out") as folder:
        (folder / "a").write_text("half")
        raise RuntimeError
    assert not list((tmp_path / "new").iterdir())


def test_a_fingerprint_is_size_and_sha256(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert sha256(tmp_path / "file").startswith("ba7816bf8f01cfea")
    assert fingerprint(tmp_path / "file") == {"bytes": 3, "sha256": sha256(tmp_path / "file")}


def test_what_differs_between_tensors_is_named_six_at_most():
    wanted = {f"layer.{n}": (2, n) for n in range(9)} | {"norm": (2,)}
    found = {"layer.0": (2, 0), "norm": (3,), "old": (1,), "mask": (4,)}
    assert tensor_problems(found, found) == []
    missing, left_over, shape = tensor_problems(found, wanted, ignore="mask|table")
    assert missing == "  8 missing: layer.1; layer.2; layer.3; layer.4; layer.5; layer.6"
    assert left_over == "  1 left over: old"
    assert shape == "  1 of another shape: norm (3,), not (2,)"
