"""Turn story text into token arrays: `python pre_tokenize.py`, or with your own text, or `--sample`.

The work is done in llm/data/tokenize.py.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from llm.console import console
from llm.data.sample import make_sample
from llm.data.tokenize import pre_tokenize


@dataclass(frozen=True)
class PreTokenizeConfig:
    """Learn a byte-level BPE vocabulary on the train split and write both splits as token arrays."""

    train: Path = Path("data/tinystories/TinyStoriesV2-GPT4-train.txt")
    """Text to train on; the vocabulary is learned on it alone. Stories are separated by <|endoftext|>."""
    eval: Path = Path("data/tinystories/TinyStoriesV2-GPT4-valid.txt")
    """Text to evaluate on."""
    out: Path | None = None
    """Directory of the arrays, a training script's --data. Default: data/tinystories, with --sample data/sample."""
    vocab_size: int = 10_000
    """Size of the vocabulary; a small text may give fewer."""
    allow_invalid_utf8: bool = False
    """Accept text of which much is not UTF-8; each invalid sequence becomes U+FFFD."""
    sample: bool = False
    """Take the built-in stories instead of --train and --eval."""


@console()
def main(argv: list[str] | None = None) -> None:
    config = tyro.cli(PreTokenizeConfig, args=argv)
    try:
        if config.sample:
            make_sample(config.out or Path("data/sample"), config.vocab_size)
        else:
            out = config.out or Path("data/tinystories")
            pre_tokenize(config.train, config.eval, out, config.vocab_size, config.allow_invalid_utf8)
    except (OSError, ValueError) as error:
        sys.exit(f"pre_tokenize: {error}")
    except KeyboardInterrupt:
        sys.exit("pre_tokenize: stopped; nothing half-written was kept. Run it again to start over.")


if __name__ == "__main__":
    main()
