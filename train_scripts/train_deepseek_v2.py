"""Train `deepseek_v2` (llm/models/deepseek.py); `--help` names every flag."""

from llm.data import open_tokens
from llm.flags import command, parse_arguments
from llm.models.deepseek import DeepseekV2, DeepseekV2Config
from llm.train import train


@command
def main(arguments: list[str] | None = None) -> None:
    settings = parse_arguments(DeepseekV2Config, arguments)
    data = open_tokens(settings.train.data)  # two memory-mapped arrays of tokens
    train(DeepseekV2, settings.model_for(data), settings.train, data)


if __name__ == "__main__":
    main()
