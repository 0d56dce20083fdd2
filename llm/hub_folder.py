"""The files of a published checkpoint: config.json, tokenizer.json, and tensors in one or several .safetensors files.

Several files have an index that says which tensor lies where. Each tensor is read alone, and one that is stored in 4 or
8 bits is expanded as it is read. Files that hold pickled data are never opened: they could run code.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llm.name_table import PretrainedError
from llm.quantized import dequantize_fp8, dequantize_mxfp4

CONFIG, INDEX, WEIGHTS, TOKENIZER = "config.json", "model.safetensors.index.json", "model.safetensors", "tokenizer.json"


def is_hub_folder(path: Path) -> bool:
    """Whether `path` holds a config.json that is not part of a run directory or checkpoint of ours."""
    path = Path(path)
    return (path / CONFIG).is_file() and not (path / "manifest.json").exists() and not (path / "checkpoints").exists()


def read_json(file: Path) -> dict[str, Any]:
    """Raises PretrainedError where there is no such file or no JSON object in it."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PretrainedError(f"{file} cannot be read: {error}; name a folder as the hub has it") from None
    if not isinstance(content, dict):
        raise PretrainedError(f"{file} holds a {type(content).__name__}, not an object with fields")
    return content


class Checkpoint:
    """The tensors of a folder by the names that its model has for them, read one at a time.

    A quantised tensor stands in several parts in the file; here it has one name and one shape like the others.
    """

    def __init__(self, folder: Path, quantization: dict[str, Any] | None, stack: ExitStack):
        self.blocks = check_quantization(folder, quantization)
        self.files = {}  # name of each stored tensor -> its open file
        for file in weight_files(folder):
            try:
                opened = stack.enter_context(safe_open(file, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise PretrainedError(f"{file} cannot be read: {error}; download it again") from None
            self.files |= dict.fromkeys(opened.keys(), opened)
        self.shapes = dict(self.read_shapes())

    def read_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        for name, file in self.files.items():
            shape = tuple(file.get_slice(name).get_shape())
            if name.endswith("_blocks") and name.removesuffix("_blocks") + "_scales" in self.files:
                n_experts, n_out, n_blocks, n_bytes = shape
                yield name.removesuffix("_blocks"), (n_experts, 2 * n_blocks * n_bytes, n_out)
            elif not (name.endswith("_scales") or name.endswith("_scale_inv")):
                yield name, shape

    def dtype_of(self, name: str) -> torch.dtype:
        return self.files[name].get_slice(name)[:0].dtype

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """One tensor; `dtype` is what a quantised one is expanded to, others come as they are."""
        if name + "_blocks" in self.files:
            return dequantize_mxfp4(self.stored(name + "_blocks"), self.stored(name + "_scales"), dtype)
        if name + "_scale_inv" in self.files:
            return dequantize_fp8(self.stored(name), self.stored(name + "_scale_inv"), dtype, self.blocks)
        return self.stored(name)

    def stored(self, name: str) -> Tensor:
        return self.files[name].get_tensor(name)


def check_quantization(folder: Path, quantization: dict[str, Any] | None) -> tuple[int, int]:
    """The block size of FP8; raises PretrainedError for weights in a form that is not expanded here."""
    method = (quantization or {}).get("quant_method")
    blocks = (quantization or {}).get("weight_block_size")
    if quantization and method != "mxfp4" and not (method == "fp8" and blocks):
        raise PretrainedError(
            f"{folder / CONFIG}: quantization_config {quantization} is not read. Read are mxfp4, and fp8 with "
            "weight_block_size; or take the same model in bf16"
        )
    return tuple(blocks or (128, 128))


def weight_files(folder: Path) -> list[Path]:
    """The .safetensors files of a folder; raises PretrainedError where one is missing or there are only others."""
    if (folder / INDEX).is_file():
        names = sorted(set(read_json(folder / INDEX).get("weight_map", {}).values()))
        for name in names:
            if Path(name).name != name or not (folder / name).is_file():
                raise PretrainedError(f"{folder / name} is missing, {INDEX} names it: download it again")
        return [folder / name for name in names]
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    pickled = [path.name for suffix in ("bin", "pt", "pth", "ckpt") for path in sorted(folder.glob(f"*.{suffix}"))]
    if pickled:
        raise PretrainedError(
            f"{folder} holds weights as {', '.join(pickled[:3])} only. Such files are pickled and can run code when "
            "they are opened, so they are refused: take the .safetensors files of the same model"
        )
    raise PretrainedError(f"{folder} holds neither {WEIGHTS} nor {INDEX}: the download is not complete")
