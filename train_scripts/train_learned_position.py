"""Train `learned_position` (llm/models/learned_position.py); `--help` names every flag."""

from llm.data import open_tokens
from llm.flags import command, parse_arguments
from llm.models.learned_position import LearnedPositionConfig, LearnedPositionDecoder
from llm.train import train


@command
def main(arguments: list[str] | None = None) -> None:
    settings = parse_arguments(LearnedPositionConfig, arguments)
    data = open_tokens(settings.train.data)  # two memory-mapped arrays of tokens
    train(LearnedPositionDecoder, settings.model_for(data), settings.train, data)


if __name__ == "__main__":
    main()
