"""Train `streaming` (llm/models/streaming.py); `--help` names every flag."""

from llm.data import open_tokens
from llm.flags import command, parse_arguments
from llm.models.streaming import Streaming, StreamingConfig
from llm.train import train


@command
def main(arguments: list[str] | None = None) -> None:
    settings = parse_arguments(StreamingConfig, arguments)
    data = open_tokens(settings.train.data)  # two memory-mapped arrays of tokens
    train(Streaming, settings.model_for(data), settings.train, data)


if __name__ == "__main__":
    main()
