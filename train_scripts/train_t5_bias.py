"""Train `t5_bias` (llm/models/t5_bias.py); `--help` names every flag."""

from llm.data.files import open_tokens
from llm.models.t5_bias import T5BiasDecoder
from llm.training.flags import command, parse_arguments
from llm.training.loop import train


@command
def main(arguments: list[str] | None = None) -> None:
    settings = parse_arguments(T5BiasDecoder.Config, arguments)
    data = open_tokens(settings.train.data)  # two memory-mapped arrays of tokens
    train(T5BiasDecoder, settings.model_for(data), settings.train, data)


if __name__ == "__main__":
    main()
