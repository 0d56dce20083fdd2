"""Published weights in, trained models out: the short names of llm/hub/, and the command that exports.

model = load_pretrained("path/to/checkpoint")                # a folder as the hub has it
export_pretrained(model, "out/", tokenizer="data/tinystories/tokenizer-bpe.json")
python -m llm.pretrained export runs/llama out/              # the same from the shell
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from llm.console import console
from llm.generate.load import load_run
from llm.hub.export import export_pretrained
from llm.hub.folder import TOKENIZER, is_hub_folder
from llm.hub.load import load_pretrained
from llm.hub.tables import PretrainedError
from llm.training.checkpoint import CheckpointError

__all__ = ["PretrainedError", "export_pretrained", "load_pretrained"]


@dataclass(frozen=True)
class Export:
    """Write a trained model as a folder that transformers opens."""

    run: tyro.conf.Positional[Path]
    """Run directory or checkpoint."""
    out: tyro.conf.Positional[Path]
    """Folder to write; must not exist or be empty."""


@console()
def main(arguments: list[str] | None = None) -> None:
    """The command."""
    flags = tyro.extras.subcommand_cli_from_dict({"export": Export}, args=arguments, prog="python -m llm.pretrained")
    model, tokenizer = load_run(flags.run, torch.device("cpu"))
    if is_hub_folder(flags.run) and (flags.run / TOKENIZER).is_file():  # a GGUF file has its own
        tokenizer = flags.run / TOKENIZER  # export copies the files beside it, too
    print(f"wrote {export_pretrained(model, flags.out, tokenizer)}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, CheckpointError) as error:
        sys.exit(f"error: {error}")
