"""Train `t5_bias` (llm/models/t5_bias.py); `--help` names every flag."""

from llm.data import open_tokens
from llm.flags import command, parse_arguments
from llm.models.t5_bias import T5BiasConfig, T5BiasDecoder
from llm.train import train


@command
def main(arguments: list[str] | None = None) -> None:
    settings = parse_arguments(T5BiasConfig, arguments)
    data = open_tokens(settings.train.data)  # two memory-mapped arrays of tokens
    train(T5BiasDecoder, settings.model_for(data), settings.train, data)


if __name__ == "__main__":
    main()
