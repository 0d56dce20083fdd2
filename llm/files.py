"""Write a file whole or not at all, fingerprint it, and compare the tensors in a file with those of a model."""

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from io import IOBase
from pathlib import Path
from typing import BinaryIO

Shape = tuple[int, ...]
DISK_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)  # numbers of the errors that say so


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[BinaryIO]:
    """Yield an empty file that replaces `target` when the block ends; after an error `target` stays as it was.

    The new file has a name of its own beside `target` until all of it is on the disk. So a reader finds the old content
    or the new, and several processes may write the same target. What killed processes left behind is removed.
    """
    remove_leftovers(target)
    with new_file(target) as file:
        temporary = Path(file.name)
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if os.name == "nt":
                file.close()  # Windows renames no open file; elsewhere it stays locked until it has its name
            os.replace(temporary, target)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()


@contextlib.contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `target` when the block ends; after an error nothing of it is left.

    `target` may be missing or an empty folder. Several processes may write the same target: the first to end wins, and
    the others raise OSError. A locked file beside the folder, with the same name, says that its process lives.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target)
    owner = new_file(target)
    folder = folder_of(Path(owner.name))
    try:
        folder.mkdir()
        yield folder
        with contextlib.suppress(FileNotFoundError):  # Windows renames no folder to one that exists, even if empty
            target.rmdir()
        os.replace(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        owner.close()
        Path(owner.name).unlink(missing_ok=True)


def folder_of(owner: Path) -> Path:
    """The folder that a temporary file stands for, where it stands for one."""
    return owner.with_suffix(".folder")


def new_file(target: Path) -> BinaryIO:
    """An empty, locked file beside `target`, with a name that no other process has."""
    while True:
        file = open(target.with_name(f"{target.name}.{secrets.token_hex(4)}.tmp"), "xb")  # noqa: SIM115
        try:
            lock(file)
            taken = not Path(file.name).exists()
        except (BlockingIOError, PermissionError):
            taken = True
        except OSError:  # some network disks know no locks
            taken = False
        if not taken:
            return file
        file.close()  # before it was locked, another process took it for a leftover


def write_atomically(path: Path, content: bytes) -> None:
    """Replace the content of `path`, all or nothing."""
    with replacing(path) as file:
        file.write(content)


def remove_leftovers(target: Path) -> None:
    """Remove the temporary files and folders of `target` that no living process has locked."""
    for path in target.parent.glob(f"{target.name}.*.tmp"):
        with contextlib.suppress(OSError):
            with open(path, "rb") as file:
                lock(file)
                shutil.rmtree(folder_of(path), ignore_errors=True)
                if os.name != "nt":
                    path.unlink()  # while it is locked: a process that has just made it sees that it is gone
            path.unlink(missing_ok=True)  # Windows removes closed files only


@contextlib.contextmanager
def waiting_lock(path: Path) -> Iterator[None]:
    """Hold the lock of a file that exists meanwhile only, after waiting for the process that holds it. On disks that
    know no locks nobody waits."""
    while True:
        with open(path, "ab") as file:
            try:
                lock(file)
            except (BlockingIOError, PermissionError):
                time.sleep(0.05)
                continue
            except OSError:
                pass
            if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                continue  # whoever held the lock has removed the file since it was opened
            try:
                yield
            finally:
                with contextlib.suppress(OSError):  # Windows: it stays
                    path.unlink()
            return


def lock(file: IOBase) -> None:
    """Lock an open file until it is closed or its process dies. Raises OSError where another process holds the lock."""
    try:
        import fcntl
    except ImportError:  # Windows locks bytes: one far behind the text, which others must be able to read
        import msvcrt

        file.seek(1 << 20)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        file.seek(0)
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(path: Path) -> dict[str, int | str]:
    """Size in bytes and SHA-256 of a file: enough to tell whether it is still what was written."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def tensor_problems(found: Mapping[str, Shape], wanted: Mapping[str, Shape], ignore: str = "") -> list[str]:
    """Compare names and shapes of stored tensors with those of a model: a line for each kind of difference.

    `ignore` is a regular expression of names that may be found though they are not wanted. Each line names six tensors
    at most: six tell which part of the model differs, sixty hide it.
    """
    common = sorted(wanted.keys() & found.keys())
    problems = {
        "missing": sorted(wanted.keys() - found.keys()),
        "left over": sorted(name for name in found.keys() - wanted.keys() if not re.fullmatch(ignore, name)),
        "of another shape": [f"{n} {found[n]}, not {wanted[n]}" for n in common if found[n] != wanted[n]],
    }
    return [f"  {len(names)} {kind}: {'; '.join(names[:6])}" for kind, names in problems.items() if names]
