"""Published weights in: a folder as the hub has it becomes a model.

    model = load_pretrained("path/to/checkpoint")
    model = load_pretrained("model.gguf")            # or a folder with one, and no .safetensors: llm/hub/gguf.py

Such a folder holds config.json, one or several .safetensors files and tokenizer.json. Tensors are copied one at a time:
each goes from its file into its place in the model before the next one is read. The tables in llm/hub/maps/ say which
tensor goes where.
"""

import re
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm.files import tensor_problems
from llm.hub.folder import CONFIG, HubTensors, read_json
from llm.hub.gguf import GGUFFile, find_gguf
from llm.hub.maps import BY_TYPE
from llm.hub.tables import PretrainedError, Published, Step, check_count, check_kind, parts, plan, read_config
from llm.models.transformer import Transformer
from llm.modules.position_encoding.rope_settings import LENGTH

NEVER_NEEDED = r".*rotary_emb\.inv_freq"  # old files store what RoPE computes
REFUSED = {
    "gemma3": "it sees images, too. Text-only checkpoints have model_type 'gemma3_text': gemma-3-270m, gemma-3-1b-pt, "
    "gemma-3-1b-it"
}


def load_pretrained(
    path: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    max_seq_len: int | None = None,
) -> Transformer:
    """The model of a hub folder in evaluation mode, in `dtype`, or in the dtype of its embedding where none is given.

    It reads texts of `max_seq_len` tokens; where that is not given, of as many as llm/hub/rope.py says.

    Raises PretrainedError where this code does not read the folder exactly. It does so before any tensor is read, with
    one exception: whether a stored head equals the embedding that config.json ties it to, only the two tensors tell.
    """
    path = Path(path)
    if file := find_gguf(path):
        stored = GGUFFile(file)
        return build(file, stored.config, lambda stack: stored, dtype, device, max_seq_len)
    config = read_json(path / CONFIG)
    quantization = config.get("quantization_config")
    return build(path, config, lambda stack: HubTensors(path, quantization, stack), dtype, device, max_seq_len)


def build(
    path: Path,
    config: dict[str, Any],
    open_tensors: Callable[[ExitStack], HubTensors | GGUFFile],
    dtype: torch.dtype | None,
    device: str | torch.device,
    max_seq_len: int | None,
) -> Transformer:
    """The model of a config.json, filled with the tensors that `open_tensors` opens."""
    Model, published = find_published(path, config)
    try:
        ours = choose_length(read_length_limited(published, config), max_seq_len, published)
        with torch.device("meta"):
            model = Model(Model.Config(**ours))
    except ValueError as error:
        raise PretrainedError(f"{path if path.is_file() else path / CONFIG}: {error}") from None
    with ExitStack() as stack:
        files = open_tensors(stack)
        steps = plan(published.rows(model.config), model.state_dict(), files.shapes)
        head = tied_head(model, published)
        check_tensors(path, model, steps, files, f"{published.ignored_weights(config)}|{re.escape(head or '')}")
        dtype = dtype or files.dtype_of(steps[0].theirs[0])
        for parameter in model.parameters():  # buffers keep the dtype that the model gave them
            parameter.data = parameter.data.to(dtype)
        model.to_empty(device=device)
        fill(model, steps, files, head)
    return model.eval()


def read_length_limited(published: Published, config: dict[str, Any]) -> dict[str, Any]:
    """Our fields. A model with dual chunk attention is limited to the length up to which that changes nothing."""
    config = dict(config)
    chunks = config.pop("dual_chunk_attention_config", None)
    ours = read_config(published, config)
    if not chunks:
        return ours
    check_kind("dual_chunk_attention_config", chunks, dict)
    limit = chunks.get(LENGTH)
    check_count(f"{LENGTH} of dual_chunk_attention_config", limit)
    warnings.warn(
        f"config.json has a dual_chunk_attention_config, which this code does not compute: it changes nothing up to "
        f"{limit:,} tokens, and longer texts are refused",
        stacklevel=3,
    )
    return {**ours, "max_seq_len": min(limit, ours["max_seq_len"]), "longest": limit}


def choose_length(ours: dict[str, Any], wanted: int | None, published: Published) -> dict[str, Any]:
    """Our fields with `max_seq_len` as the caller wants it. Raises ValueError for a length that cannot be."""
    longest = ours.pop("longest", None)
    if wanted is None or wanted == ours["max_seq_len"]:
        return ours
    if published.fixed_length:
        raise ValueError(
            f"max_seq_len = {wanted}: this model has a table of {ours['max_seq_len']} positions and no others"
        )
    if longest and wanted > longest:
        raise ValueError(f"max_seq_len = {wanted} is beyond {longest}, where dual chunk attention begins: unknown here")
    return ours | {"max_seq_len": wanted}


def find_model(path: Path, config: dict[str, Any]) -> type[Transformer]:
    """The model of a config.json's model_type; raises PretrainedError for an unknown one."""
    return find_published(path, config)[0]


def find_published(path: Path, config: dict[str, Any]) -> tuple[type[Transformer], Published]:
    """The model of a config.json's model_type, and how it is stored; raises PretrainedError for an unknown one."""
    names = ", ".join(sorted(BY_TYPE))
    if "model_type" not in config:
        raise PretrainedError(
            f"{path / CONFIG} has no model_type, which says how to read it: take the config.json that the hub has for "
            f"this model, or write it in, one of {names}"
        )
    kind = str(config["model_type"])
    if kind in REFUSED:
        raise PretrainedError(f"{path / CONFIG}: model_type {kind!r} is not read: {REFUSED[kind]}")
    if kind not in BY_TYPE:
        raise PretrainedError(f"{path / CONFIG}: model_type {kind!r} is not known; known are {names}")
    return BY_TYPE[kind]


def check_tensors(
    path: Path, model: Transformer, steps: list[Step], files: HubTensors | GGUFFile, ignored: str
) -> None:
    """Raises PretrainedError naming tensors that are missing, left over or of another shape; reads headers only."""
    tensors, wanted = model.state_dict(), {}
    for step in steps:
        shapes = (tuple(x.shape) for x in step.operation.save(parts(tensors, step)))
        wanted |= zip(step.theirs, shapes, strict=True)
    for name in sorted(wanted.keys() & files.shapes.keys()):
        files.check_dtype(name)
    if problems := tensor_problems(files.shapes, wanted, f"{NEVER_NEEDED}|{ignored}"):
        raise PretrainedError("\n".join([f"the tensors in {path} are not those its config.json asks for:", *problems]))


def tied_head(model: Transformer, published: Published) -> str | None:
    """Their name of the head where ours is the embedding: a checkpoint may store it a second time."""
    if not model.config.tie_embeddings:
        return None
    return next((theirs for ours, theirs, _ in published.rows(model.config) if ours == "lm_head.weight"), None)


@torch.no_grad()
def fill(model: Transformer, steps: list[Step], files: HubTensors | GGUFFile, head: str | None) -> None:
    """Copy every tensor into its place; raises PretrainedError where a tied `head` differs from the embedding."""
    tensors = model.state_dict()
    for step in steps:
        copy_step(step, tensors, files)
    embedding = model.tok_embed.weight
    if head in files.shapes and not torch.equal(files.read(head, embedding.dtype).to(embedding), embedding):
        raise PretrainedError(f"config.json ties the head to the embedding, but {head} is another matrix")


def copy_step(step: Step, tensors: dict[str, Tensor], files: HubTensors | GGUFFile) -> None:
    """Copy the tensors of one step. They are freed at the end, so memory holds the model and one step's tensors."""
    targets = parts(tensors, step)
    theirs = [files.read(name, targets[0].dtype) for name in step.theirs]
    for target, value in zip(targets, step.operation.load(theirs), strict=True):
        target.copy_(value)
