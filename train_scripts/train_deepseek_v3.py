"""Train `deepseek_v3` (llm/models/deepseek.py); `--help` names every flag."""

from llm.data import open_tokens
from llm.flags import command, parse_arguments
from llm.models.deepseek import DeepseekV3, DeepseekV3Config
from llm.train import train


@command
def main(arguments: list[str] | None = None) -> None:
    settings = parse_arguments(DeepseekV3Config, arguments)
    data = open_tokens(settings.train.data)  # two memory-mapped arrays of tokens
    train(DeepseekV3, settings.model_for(data), settings.train, data)


if __name__ == "__main__":
    main()
