"""Train `qk_norm` (llm/models/qk_norm.py); `--help` names every flag."""

from llm.data import open_tokens
from llm.flags import command, parse_arguments
from llm.models.qk_norm import QKNormConfig, QKNormDecoder
from llm.train import train


@command
def main(arguments: list[str] | None = None) -> None:
    settings = parse_arguments(QKNormConfig, arguments)
    data = open_tokens(settings.train.data)  # two memory-mapped arrays of tokens
    train(QKNormDecoder, settings.model_for(data), settings.train, data)


if __name__ == "__main__":
    main()
