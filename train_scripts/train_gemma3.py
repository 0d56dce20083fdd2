"""Train `gemma3` (llm/models/gemma.py); `--help` names every flag."""

from llm.data import open_tokens
from llm.flags import command, parse_arguments
from llm.models.gemma import Gemma3, Gemma3Config
from llm.train import train


@command
def main(arguments: list[str] | None = None) -> None:
    settings = parse_arguments(Gemma3Config, arguments)
    data = open_tokens(settings.train.data)  # two memory-mapped arrays of tokens
    train(Gemma3, settings.model_for(data), settings.train, data)


if __name__ == "__main__":
    main()
