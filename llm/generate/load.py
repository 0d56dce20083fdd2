"""Load a model and its tokenizer from a run directory, a checkpoint or a hub folder."""

import json
from dataclasses import fields
from pathlib import Path

import torch
from tokenizers import Tokenizer

from llm.data.files import TOKENIZER_FILE, load_tokenizer
from llm.hub.folder import is_hub_folder, load_hub_tokenizer
from llm.hub.gguf import GGUFFile, find_gguf
from llm.hub.gguf_tokenizer import gguf_tokenizer
from llm.hub.load import load_pretrained
from llm.models import MODELS
from llm.models.transformer import Transformer
from llm.training.checkpoint import (
    CheckpointError,
    find_checkpoints,
    load_model_weights,
    newest_good,
    verify_checkpoint,
)


def load_run(path: Path, device: torch.device, max_seq_len: int | None = None) -> tuple[Transformer, Tokenizer]:
    """The model and the tokenizer of a run directory (its newest good checkpoint), a checkpoint or a hub folder.

    `max_seq_len` is the longest text that the model is to read; where it is not given, the model keeps its own.

    Raises CheckpointError where there is none, where a file is not what was saved, or where this code does not know the
    model; PretrainedError for a hub folder that cannot be read.
    """
    if file := find_gguf(path):
        return load_pretrained(file, device=device, max_seq_len=max_seq_len), gguf_tokenizer(GGUFFile(file))
    if is_hub_folder(path):
        return load_pretrained(path, device=device, max_seq_len=max_seq_len), load_hub_tokenizer(path)
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    checkpoint = newest_good(folder) if find_checkpoints(folder) else folder
    if checkpoint is None or not (checkpoint / "manifest.json").is_file():
        raise CheckpointError(f"{path} holds no complete checkpoint: name a run directory that training wrote")
    verify_checkpoint(checkpoint)
    with torch.device("meta"):
        model = build_model(checkpoint, max_seq_len)
    model.to_empty(device=device)
    load_model_weights(checkpoint, model)
    return model.eval(), load_tokenizer(checkpoint / TOKENIZER_FILE)


def build_model(checkpoint: Path, max_seq_len: int | None = None) -> Transformer:
    """The model of a checkpoint's config.json; raises CheckpointError for a name or a field that is not known here."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    name, settings = config["model_name"], config["model"]
    advice = "use the version of this code that wrote it"
    if name not in MODELS:
        raise CheckpointError(f"{checkpoint} holds a {name!r}; known are {', '.join(MODELS)}: {advice}")
    Model = MODELS[name]
    unknown = sorted(settings.keys() - {field.name for field in fields(Model.Config)})
    if unknown:
        raise CheckpointError(f"{checkpoint} sets {', '.join(unknown)}, which a {name!r} does not have here: {advice}")
    return Model(Model.Config(**settings | ({} if max_seq_len is None else {"max_seq_len": max_seq_len})))
