"""Published weights in, trained models out.

    model = load_pretrained("path/to/checkpoint")                # a folder as the hub has it
    export_pretrained(model, "out/", tokenizer="data/tinystories/tokenizer-bpe.json")
    python -m llm.pretrained export runs/llama out/              # the same from the shell

Such a folder holds config.json, one or several .safetensors files and tokenizer.json. Loading streams: each tensor goes
from its file into its place in the model before the next one is read. Which tensor goes where, each model's file says
(`published`, explained in llm/name_table.py).
"""

import re
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from llm.export import export_pretrained
from llm.hub_folder import CONFIG, TOKENIZER, Checkpoint, is_hub_folder, read_json
from llm.models import MODELS
from llm.models.transformer import Transformer
from llm.name_table import PretrainedError, Step, parts, plan, read_config

NEVER_NEEDED = r".*rotary_emb\.inv_freq"  # old files store what RoPE computes
REFUSED = {
    "gemma3": "it sees images, too. Text-only checkpoints have model_type 'gemma3_text': gemma-3-270m, gemma-3-1b-pt, "
    "gemma-3-1b-it"
}


def load_pretrained(
    path: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> Transformer:
    """The model of a hub folder in evaluation mode, in `dtype`, or in that of its embedding where none is given.

    Raises PretrainedError where the folder is not what this code reads exactly: before any tensor is read, but for a
    head that config.json ties to the embedding and that is another matrix, which only the two tensors can tell.
    """
    path = Path(path)
    config = read_json(path / CONFIG)
    Model, Config = find_model(path, config)
    try:
        with torch.device("meta"):
            model = Model(Config(**read_config(Model.published, config)))
    except ValueError as error:
        raise PretrainedError(f"{path / CONFIG}: {error}") from None
    with ExitStack() as stack:
        files = Checkpoint(path, config.get("quantization_config"), stack)
        steps = plan(Model.published.names, model.state_dict(), files.shapes)
        check(path, model, steps, files, Model.published.ignored_weights(config))
        dtype = dtype or files.dtype_of(steps[0].theirs[0])
        for parameter in model.parameters():  # buffers stay as the model wants them
            parameter.data = parameter.data.to(dtype)
        model.to_empty(device=device)
        fill(model, steps, files)
    return model.eval()


def find_model(path: Path, config: dict[str, Any]) -> tuple[type[Transformer], type]:
    """The model and the config class of a config.json's model_type; raises PretrainedError for an unknown one."""
    kind = str(config.get("model_type"))
    if kind in REFUSED:
        raise PretrainedError(f"{path / CONFIG}: model_type {kind!r} is not read: {REFUSED[kind]}")
    pairs = (pair for pair in MODELS.values() if hasattr(pair[0], "published"))
    known = {Model.published.model_type: (Model, Config) for Model, Config in pairs}
    if kind not in known:
        raise PretrainedError(
            f"{path / CONFIG}: model_type {kind!r} is not known; known are {', '.join(sorted(known))}"
        )
    return known[kind]


def check(path: Path, model: Transformer, steps: list[Step], files: Checkpoint, ignored: str) -> None:
    """Raises PretrainedError naming what is missing, left over or of another shape; only headers have been read."""
    tensors, wanted = model.state_dict(), {}
    for step in steps:
        shapes = (tuple(x.shape) for x in step.operation.save(parts(tensors, step)))
        wanted |= zip(step.theirs, shapes, strict=True)
    common = wanted.keys() & files.shapes.keys()
    for name in sorted(common):
        files.check_dtype(name)
    ignored = re.compile(f"{NEVER_NEEDED}|{ignored}|{re.escape(tied_head(model) or '')}")
    problems = {
        "missing": sorted(wanted.keys() - common),
        "left over": sorted(name for name in files.shapes.keys() - common if not ignored.fullmatch(name)),
        "of another shape": [
            f"{name} {files.shapes[name]}, not {wanted[name]}"
            for name in sorted(common)
            if files.shapes[name] != wanted[name]
        ],
    }
    if any(problems.values()):
        lines = [f"  {len(names)} {kind}: {'; '.join(names[:6])}" for kind, names in problems.items() if names]
        raise PretrainedError("\n".join([f"the tensors in {path} are not those its config.json asks for:", *lines]))


def tied_head(model: Transformer) -> str | None:
    """Their name of the head where ours is the embedding: a checkpoint may hold it a second time."""
    if not model.config.tie_embeddings:
        return None
    return next((theirs for ours, theirs, _ in type(model).published.names if ours == "lm_head.weight"), None)


@torch.no_grad()
def fill(model: Transformer, steps: list[Step], files: Checkpoint) -> None:
    """Copy every tensor into its place; raises PretrainedError where a tied head is not the embedding after all."""
    tensors = model.state_dict()
    for step in steps:
        move(step, tensors, files)
    head, embedding = tied_head(model), model.tok_embed.weight
    if head in files.shapes and not torch.equal(files.read(head, embedding.dtype).to(embedding), embedding):
        raise PretrainedError(f"config.json ties the head to the embedding, but {head} is another matrix")


def move(step: Step, tensors: dict[str, Tensor], files: Checkpoint) -> None:
    """What was read for one step is let go at its end: memory holds the model and this."""
    targets = parts(tensors, step)
    theirs = [files.read(name, targets[0].dtype) for name in step.theirs]
    for target, value in zip(targets, step.operation.load(theirs), strict=True):
        target.copy_(value)


@dataclass(frozen=True)
class Export:
    """Write a trained model as a folder that transformers opens."""

    run: tyro.conf.Positional[Path]
    """Run directory or checkpoint."""
    out: tyro.conf.Positional[Path]
    """Folder to write; must not exist or be empty."""


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    from llm.generate import load_run  # which imports this module

    flags = tyro.extras.subcommand_cli_from_dict({"export": Export}, args=arguments)
    model, tokenizer = load_run(flags.run, torch.device("cpu"))
    if is_hub_folder(flags.run):
        tokenizer = flags.run / TOKENIZER  # with all that stands beside it
    print(f"wrote {export_pretrained(model, flags.out, tokenizer)}")


if __name__ == "__main__":
    from llm.checkpoint import CheckpointError

    try:
        main()
    except (ValueError, CheckpointError) as error:
        sys.exit(f"error: {error}")
