"""Train `qwen3` (llm/models/qwen3.py); `--help` names every flag."""

from llm.data import open_tokens
from llm.flags import command, parse_arguments
from llm.models.qwen3 import Qwen3, Qwen3Config
from llm.train import train


@command
def main(arguments: list[str] | None = None) -> None:
    settings = parse_arguments(Qwen3Config, arguments)
    data = open_tokens(settings.train.data)  # two memory-mapped arrays of tokens
    train(Qwen3, settings.model_for(data), settings.train, data)


if __name__ == "__main__":
    main()
