"""Train `sliding_window` (llm/models/sliding_window.py); `--help` names every flag."""

from llm.data.files import open_tokens
from llm.models.sliding_window import SlidingWindow
from llm.training.flags import command, parse_arguments
from llm.training.loop import train


@command
def main(arguments: list[str] | None = None) -> None:
    settings = parse_arguments(SlidingWindow.Config, arguments)
    data = open_tokens(settings.train.data)  # two memory-mapped arrays of tokens
    train(SlidingWindow, settings.model_for(data), settings.train, data)


if __name__ == "__main__":
    main()
