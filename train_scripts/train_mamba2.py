"""Train `mamba2` (llm/models/mamba2.py); `--help` names every flag."""

from llm.data.files import open_tokens
from llm.models.mamba2 import Mamba2Decoder
from llm.training.flags import command, parse_arguments
from llm.training.loop import train


@command
def main(arguments: list[str] | None = None) -> None:
    settings = parse_arguments(Mamba2Decoder.Config, arguments)
    data = open_tokens(settings.train.data)  # two memory-mapped arrays of tokens
    train(Mamba2Decoder, settings.model_for(data), settings.train, data)


if __name__ == "__main__":
    main()
