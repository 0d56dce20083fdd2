"""GGUF files: one file with the weights, mostly quantised, the sizes and the tokenizer, as llama.cpp has them.

    model = load_pretrained("model.gguf")

The package `gguf` (an extra: `uv sync --extra gguf`) reads the file and dequantises one tensor at a time, of stacked
experts one expert. Tensors and sizes are given the names that the same model has on the hub, so that llm/hub/maps/
reads both: gguf_layouts.py has the names, gguf_config.py reads the sizes.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llm.hub.folder import check_not_a_pointer
from llm.hub.gguf_config import FACTORS, Metadata, read_config
from llm.hub.tables import PretrainedError


class Stored(NamedTuple):
    """Where a tensor of the hub is in the file."""

    tensor: Any
    """What the package `gguf` read, quantised."""
    part: str
    """Its name without `blk.N.`, which says how it was changed."""
    expert: int | None
    """Its place in a stack of experts."""


class GGUFFile(Metadata):
    """A GGUF file, which has the tensors of a hub folder under their published names, read one at a time.

    `config` are the fields of its config.json. Raises PretrainedError where the package `gguf` is missing, for a part
    of a file or a note of Git LFS, and for an architecture, a field or a tensor that is not known here.
    """

    def __init__(self, path: Path):
        try:
            from gguf import GGUFReader
        except ImportError:
            raise PretrainedError(
                f"{path} is read by the package gguf: uv sync --extra gguf, or pip install gguf"
            ) from None
        check_not_a_pointer(path)
        try:
            reader = GGUFReader(path)
        except (OSError, ValueError, IndexError) as error:
            raise PretrainedError(f"{path} cannot be read: {error}; download it again") from None
        super().__init__(path, reader.fields)
        if (n_parts := max(part_of(path.name)[1], self.get("split.count", 1))) > 1:
            raise PretrainedError(
                f"{path} is one of {n_parts} parts of a file, and whole files are read: join them with llama.cpp's "
                "llama-gguf-split --merge FIRST_PART WHOLE.gguf, and name the whole file"
            )
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        factors = {name: tensors.pop(name).data.reshape(-1).tolist() for name in FACTORS if name in tensors}
        self.tensors = {name: stored for tensor in tensors.values() for name, stored in self.published(tensor)}
        embedding = self.tensors.get(f"{self.layout.names['token_embd']}.weight")
        if embedding is None:
            raise PretrainedError(f"{path} holds no token_embd.weight, the embedding: download it again")
        tied = "lm_head.weight" not in self.tensors
        self.config = read_config(self, factors, int(embedding.tensor.shape[-1]), tied)
        self.shapes = {name: tuple(self.change(stored, meta(stored)).shape) for name, stored in self.tensors.items()}

    def published(self, tensor: Any) -> list[tuple[str, Stored]]:
        """The tensors of the hub that a tensor of the file holds: one, or one for each expert."""
        found = re.fullmatch(r"(?:blk\.(\d+)\.)?(.+?)(?:\.(weight|bias))?", tensor.name)
        layer, stem, kind = found.groups()
        part = stem if kind is None else f"{stem}.{kind}"
        names = self.layout.names
        template = names.get(part) or (f"{names[stem]}.{kind}" if kind and stem in names else None)
        if template is None or ("{layer}" in template) != (layer is not None):
            raise PretrainedError(f"{self.path} holds {tensor.name}, which a {self.architecture} here does not have")
        if "{expert}" not in template:
            return [(template.format(layer=layer), Stored(tensor, part, None))]
        experts = range(int(tensor.shape[-1]))
        return [(template.format(layer=layer, expert=i), Stored(tensor, part, i)) for i in experts]

    def check_dtype(self, name: str) -> None:
        """Every kind of number in a GGUF file is dequantised."""

    def dtype_of(self, name: str) -> torch.dtype:
        """What a tensor becomes where no dtype is asked for: fp32, as in transformers."""
        return torch.float32

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """A tensor as it is on the hub."""
        from gguf import dequantize

        stored = self.tensors[name]
        data = stored.tensor.data if stored.expert is None else stored.tensor.data[stored.expert]
        x = torch.from_numpy(dequantize(data, stored.tensor.tensor_type).copy())
        return self.change(stored, x.view(meta(stored).shape)).to(dtype)

    def change(self, stored: Stored, x: Tensor) -> Tensor:
        """Undo what llama.cpp's converter did to the numbers."""
        changes, stem = self.layout.changes, re.sub(r"\.(weight|bias)$", "", stored.part)
        change = changes.get(stored.part) or changes.get(stem)
        return change(x, self.config) if change else x


def meta(stored: Stored) -> Tensor:
    """A tensor without numbers in the shape in which the file holds it."""
    shape = tuple(map(int, reversed(stored.tensor.shape)))
    return torch.empty(shape if stored.expert is None else shape[1:], device="meta")


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that `path` is, or the only one of a folder without .safetensors files, which come first; None for
    other paths and for a run directory. Of a file in several parts it is one part, which GGUFFile refuses.

    Raises PretrainedError for a folder with several.
    """
    if path.suffix == ".gguf" and path.is_file():
        return path
    if any(path.glob("*.safetensors*")) or (path / "checkpoints").exists():
        return None
    found = sorted(path.glob("*.gguf"))
    files = [file for file in found if part_of(file.name)[0] == 1] or found[:1]
    if len(files) > 1:
        raise PretrainedError(f"{path} holds {len(files)} GGUF files: name one, such as {files[0]}")
    return files[0] if files else None


def part_of(name: str) -> tuple[int, int]:
    """Which part of how many a file of this name is, as in model-00001-of-00002.gguf; (1, 1) for a whole one."""
    found = re.fullmatch(r".*-(\d{5})-of-(\d{5})\.gguf", name)
    return (int(found[1]), int(found[2])) if found else (1, 1)
