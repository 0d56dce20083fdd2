"""A folder that exists whole or not at all, with a manifest that tells whether its files are still what was written.

It is written as `NAME.tmp`, sealed with a manifest (size and SHA-256 of each file, and the manifest's own SHA-256),
forced to the disk and renamed to NAME. So a folder with its final name is complete. Where NAME exists already, it is
renamed to `NAME.replaced` first, so at every moment one of the two is whole.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

from llm.files import fingerprint

MANIFEST = "manifest.json"


class DamagedFolder(RuntimeError):
    """A folder that is missing, incomplete or changed since it was sealed; the message names the file, and what was
    expected and found."""


def seal(folder: Path, facts: dict) -> None:
    """Write the manifest, which holds `facts` and the fingerprint of every file; force folder and files to the disk."""
    manifest = facts | {"files": {path.name: fingerprint(path) for path in sorted(folder.iterdir())}}
    manifest["sha256"] = manifest_hash(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for path in folder.iterdir():
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    sync(folder)


def put_in_place(temporary: Path, target: Path) -> None:
    """Rename the sealed `temporary` to `target`, which may exist."""
    replaced = target.with_name(target.name + ".replaced")
    if target.exists():
        os.replace(target, replaced)
    os.replace(temporary, target)
    sync(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def clean_leftovers(parent: Path) -> None:
    """Finish or undo what a killed process was doing in `parent`: writing, replacing or removing a folder."""
    for path in [*parent.glob("*.tmp"), *parent.glob("*.replaced")]:
        target = path.with_suffix("")
        if path.suffix == ".replaced" and not target.exists():
            os.replace(path, target)
        else:
            shutil.rmtree(path, ignore_errors=True)


def remove(folder: Path) -> None:
    """Rename the folder, then delete it, so that a half-deleted folder never has its final name."""
    doomed = folder.with_name(folder.name + ".tmp")
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def verify(folder: Path) -> dict:
    """The manifest, after comparing every file's size and SHA-256 with it. Raises DamagedFolder."""
    manifest = read_manifest(folder)
    for name, expected in manifest["files"].items():
        if not (folder / name).is_file():
            raise DamagedFolder(f"{folder / name} is missing.")
        found = fingerprint(folder / name)
        for what, unit in (("bytes", "bytes"), ("sha256", "as SHA-256")):
            if found[what] != expected[what]:
                raise DamagedFolder(
                    f"{folder / name} is damaged: expected {expected[what]} {unit}, found {found[what]}."
                )
    return manifest


def read_manifest(folder: Path) -> dict:
    """The manifest, after comparing it with its own SHA-256; the files are not read. Raises DamagedFolder."""
    file = folder / MANIFEST
    if not folder.is_dir():
        raise DamagedFolder(f"{folder} is {'a file, not a folder' if folder.exists() else 'not there'}.")
    try:
        manifest = json.loads(file.read_bytes())
        expected, found = manifest["sha256"], manifest_hash(manifest)
    except FileNotFoundError:
        raise DamagedFolder(f"{file} is missing.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedFolder(f"{file} is damaged: {error!r}.") from None
    if expected != found:
        raise DamagedFolder(f"{file} is damaged: expected {expected} as SHA-256, found {found}.")
    return manifest


def manifest_hash(manifest: dict) -> str:
    rest = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def sync(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open a folder
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
