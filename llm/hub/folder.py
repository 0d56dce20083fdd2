"""The files of a published checkpoint: config.json, tokenizer.json, and tensors in one or several .safetensors files.

Where there are several, an index says which tensor is in which file. Tensors are read one at a time, and those stored
in 4 or 8 bits are expanded as they are read. Files with pickled data are never opened, since they could run code.
"""

import contextlib
import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer, processors
from torch import Tensor

from llm.hub.quantized import block_counts, dequantize_fp8, dequantize_mxfp4
from llm.hub.tables import PretrainedError

CONFIG, INDEX, WEIGHTS = "config.json", "model.safetensors.index.json", "model.safetensors"
TOKENIZER, TOKENIZER_CONFIG, GENERATION_CONFIG = "tokenizer.json", "tokenizer_config.json", "generation_config.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FLOAT8 = {"F8_E4M3", "F8_E5M2"}
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def is_hub_folder(path: Path) -> bool:
    """Whether `path` holds a config.json and is neither a run directory nor a checkpoint of ours."""
    path = Path(path)
    return (path / CONFIG).is_file() and not (path / "manifest.json").exists() and not (path / "checkpoints").exists()


def read_json(file: Path, optional: bool = False) -> dict[str, Any]:
    """The JSON object in a file, empty where the file is `optional` and missing. Raises PretrainedError."""
    if optional and not file.is_file():
        return {}
    check_not_a_pointer(file)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PretrainedError(f"{file} cannot be read: {error}; name a folder as the hub has it") from None
    if not isinstance(content, dict):
        raise PretrainedError(f"{file} holds a {type(content).__name__}, not an object with fields")
    return content


def check_not_a_pointer(file: Path) -> None:
    """Raises PretrainedError where Git LFS left a note about a file in its place."""
    with contextlib.suppress(OSError), open(file, "rb") as opened:
        if opened.read(len(LFS_POINTER)) == LFS_POINTER:
            raise PretrainedError(
                f"{file} is a Git LFS pointer, not the file itself: install git-lfs, run git lfs pull in its folder"
            )


def load_hub_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a hub folder. Special tokens written in a text become their ids.

    It puts `bos_token` before a text where tokenizer_config.json has `add_bos_token`, even if tokenizer.json has no
    rule for it, as with DeepSeek. (transformers 4 did so, too; 5 follows tokenizer.json alone.) Apart from that it adds
    only what tokenizer.json says. Raises PretrainedError where tokenizer.json is missing or broken; a tokenizer.model
    is not read.
    """
    file, settings = Path(folder) / TOKENIZER, read_json(Path(folder) / TOKENIZER_CONFIG, optional=True)
    if not file.is_file():
        raise PretrainedError(f"{file} is missing: without it there is no text, only tokens")
    check_not_a_pointer(file)
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing narrower
        raise PretrainedError(f"{file} is not a tokenizer file ({error}): download it again") from None
    tokenizer.no_padding()  # a file may ask for both, and transformers does neither unless it is told to
    tokenizer.no_truncation()
    bos = settings.get("bos_token")
    bos = bos.get("content") if isinstance(bos, dict) else bos
    if settings.get("add_bos_token") and isinstance(bos, str):
        number = tokenizer.token_to_id(bos)
        if number is None:
            raise PretrainedError(f"{file} has no {bos!r}, which {TOKENIZER_CONFIG} puts before each text")
        if tokenizer.encode("").ids[:1] != [number]:
            tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, number)])
    elif tokenizer.post_processor is None:
        tokenizer.post_processor = processors.TemplateProcessing("$A", special_tokens=[])
    return tokenizer


def stop_tokens(path: Path) -> tuple[int, ...]:
    """The tokens that end a text of a published model; none for a run of ours, whose texts end at <|endoftext|>."""
    if not is_hub_folder(path):
        return ()
    settings = read_json(path / CONFIG) | read_json(path / GENERATION_CONFIG, optional=True)
    ends = settings.get("eos_token_id")
    return tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,)


class Stored(NamedTuple):
    """A tensor as the header of its file describes it; `dtype` as safetensors calls it."""

    file: Path
    opened: safe_open
    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape} in {self.file}"


class HubTensors:
    """The tensors of a hub folder by their published names, read one at a time.

    A quantised tensor is stored in several parts; here it has one name and one shape like the others. Raises
    PretrainedError for parts that do not belong together.
    """

    def __init__(self, folder: Path, quantization: dict[str, Any] | None, stack: ExitStack):
        self.blocks = check_quantization(folder, quantization)
        self.parts: dict[str, Stored] = {}
        files, where = weight_files(folder)
        for file in files:
            check_not_a_pointer(file)
            try:
                opened = stack.enter_context(safe_open(file, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise PretrainedError(f"{file} cannot be read: {error}; download it again") from None
            for name in [name for name in opened.keys() if where.get(name, file.name) == file.name]:  # noqa: SIM118
                header = opened.get_slice(name)
                self.parts[name] = Stored(file, opened, tuple(header.get_shape()), header.get_dtype())
        self.shapes = dict(self.read_shapes())

    def read_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        for name, part in self.parts.items():
            if name.endswith("_blocks"):
                whole = name.removesuffix("_blocks")
                self.check_mxfp4(whole)
                n_experts, n_out, n_blocks, n_bytes = part.shape
                yield whole, (n_experts, 2 * n_blocks * n_bytes, n_out)
            elif name.endswith("_scales"):
                self.check_mxfp4(name.removesuffix("_scales"))
            elif name.endswith("_scale_inv"):
                self.check_fp8(name.removesuffix("_scale_inv"))
            else:
                yield name, part.shape

    def check_mxfp4(self, name: str) -> None:
        """Raises PretrainedError unless there are blocks (E, out, n, 16) and scales (E, out, n), both in bytes."""
        blocks, scales = self.parts.get(name + "_blocks"), self.parts.get(name + "_scales")
        if None in (blocks, scales):
            there, missing = ("blocks", "scales") if blocks else ("scales", "blocks")
            raise PretrainedError(f"{name}_{there} ({blocks or scales}) has no {name}_{missing}")
        if len(blocks.shape) != 4 or blocks.shape != (*scales.shape, 16) or {blocks.dtype, scales.dtype} != {"U8"}:
            raise PretrainedError(f"{name}_blocks ({blocks}) and {name}_scales ({scales}) are not MXFP4")

    def check_fp8(self, name: str) -> None:
        """Raises PretrainedError unless `name` is a matrix in float8 with a scale for each block."""
        weight, scales = self.parts.get(name), self.parts[name + "_scale_inv"]
        if weight is None:
            raise PretrainedError(f"{name}_scale_inv ({scales}) has no {name}")
        numbers = weight.dtype in FLOAT8 and scales.dtype in DTYPES
        if not numbers or len(weight.shape) != 2 or scales.shape != block_counts(weight.shape, self.blocks):
            raise PretrainedError(
                f"{name} ({weight}) and {name}_scale_inv ({scales}) are not FP8 in blocks of {self.blocks}"
            )

    def check_dtype(self, name: str) -> None:
        """Raises PretrainedError for numbers that would be read as something else: float8 without scales, integers."""
        part = self.parts.get(name)
        if part is None or part.dtype in DTYPES or name + "_scale_inv" in self.parts:
            return
        lacks = f" without {name}_scale_inv" if part.dtype in FLOAT8 else ""
        raise PretrainedError(f"{name} ({part}) is not read{lacks}: take the same model in bf16")

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype of a stored tensor; bf16 for a quantised one."""
        return DTYPES.get(self.parts[name].dtype, torch.bfloat16)

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """One tensor. A quantised one is expanded to `dtype`, others are returned as they are stored."""
        if name + "_blocks" in self.parts:
            return dequantize_mxfp4(self.stored(name + "_blocks"), self.stored(name + "_scales"), dtype)
        if name + "_scale_inv" in self.parts:
            return dequantize_fp8(self.stored(name), self.stored(name + "_scale_inv"), dtype, self.blocks)
        return self.stored(name)

    def stored(self, name: str) -> Tensor:
        return self.parts[name].opened.get_tensor(name)


def check_quantization(folder: Path, quantization: Any) -> tuple[int, int]:
    """The block size of FP8; raises PretrainedError for a quantisation that is not read here."""
    settings = quantization if isinstance(quantization, dict) else {"quant_method": quantization}
    method, blocks = settings.get("quant_method"), settings.get("weight_block_size")
    sized = isinstance(blocks, list) and len(blocks) == 2 and all(isinstance(n, int) and n > 0 for n in blocks)
    if quantization and method != "mxfp4" and not (method == "fp8" and sized):
        raise PretrainedError(
            f"{folder / CONFIG}: quantization_config {quantization} is not read. Read are mxfp4, and fp8 with "
            "weight_block_size; or take the same model in bf16"
        )
    return tuple(blocks) if sized else (128, 128)


def weight_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The .safetensors files of a folder, and the index: which tensor is to be taken from which of them, where there is
    one. Raises PretrainedError where a file is missing or there are only others."""
    if (folder / INDEX).is_file():
        where = read_json(folder / INDEX).get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
            raise PretrainedError(f"{folder / INDEX} has no weight_map from tensors to files: download it again")
        if (folder / WEIGHTS).is_file():  # all in one file, which transformers takes, too: the index is an old one
            return [folder / WEIGHTS], {}
        names = sorted(set(where.values()))
        for name in names:
            if Path(name).name != name or not (folder / name).is_file():
                raise PretrainedError(f"{folder / name} is missing, {INDEX} names it: download it again")
        return [folder / name for name in names], where
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS], {}
    pickled = [path.name for suffix in ("bin", "pt", "pth", "ckpt") for path in sorted(folder.glob(f"*.{suffix}"))]
    if pickled:
        raise PretrainedError(
            f"{folder} holds weights as {', '.join(pickled[:3])} only. Such files are pickled and can run code when "
            "they are opened, so they are refused: take the .safetensors files of the same model"
        )
    raise PretrainedError(f"{folder} holds neither {WEIGHTS} nor {INDEX}: the download is not complete")
