"""Train `deepseek_v3_2` (llm/models/case_studies/deepseek_v3_2.py); `--help` names every flag."""

from llm.data.files import open_tokens
from llm.models.case_studies.deepseek_v3_2 import DeepseekV32
from llm.training.flags import command, parse_arguments
from llm.training.loop import train


@command
def main(arguments: list[str] | None = None) -> None:
    settings = parse_arguments(DeepseekV32.Config, arguments)
    data = open_tokens(settings.train.data)  # two memory-mapped arrays of tokens
    train(DeepseekV32, settings.model_for(data), settings.train, data)


if __name__ == "__main__":
    main()
