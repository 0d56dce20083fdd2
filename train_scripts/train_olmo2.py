"""Train `olmo2` (llm/models/olmo2.py); `--help` names every flag."""

from llm.data import open_tokens
from llm.flags import command, parse_arguments
from llm.models.olmo2 import OLMo2, OLMo2Config
from llm.train import train


@command
def main(arguments: list[str] | None = None) -> None:
    settings = parse_arguments(OLMo2Config, arguments)
    data = open_tokens(settings.train.data)  # two memory-mapped arrays of tokens
    train(OLMo2, settings.model_for(data), settings.train, data)


if __name__ == "__main__":
    main()
