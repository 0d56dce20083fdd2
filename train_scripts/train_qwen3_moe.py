"""Train `qwen3_moe` (llm/models/qwen3_moe.py); `--help` names every flag."""

from llm.data import open_tokens
from llm.flags import command, parse_arguments
from llm.models.qwen3_moe import Qwen3MoE, Qwen3MoEConfig
from llm.train import train


@command
def main(arguments: list[str] | None = None) -> None:
    settings = parse_arguments(Qwen3MoEConfig, arguments)
    data = open_tokens(settings.train.data)  # two memory-mapped arrays of tokens
    train(Qwen3MoE, settings.model_for(data), settings.train, data)


if __name__ == "__main__":
    main()
