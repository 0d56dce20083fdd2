"""Train `rwkv7` (llm/models/rwkv7.py); `--help` names every flag."""

from llm.data.files import open_tokens
from llm.models.rwkv7 import RWKV7
from llm.training.flags import command, parse_arguments
from llm.training.loop import train


@command
def main(arguments: list[str] | None = None) -> None:
    settings = parse_arguments(RWKV7.Config, arguments)
    data = open_tokens(settings.train.data)  # two memory-mapped arrays of tokens
    train(RWKV7, settings.model_for(data), settings.train, data)


if __name__ == "__main__":
    main()
