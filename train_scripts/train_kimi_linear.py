"""Train `kimi_linear` (llm/models/case_studies/kimi_linear.py); `--help` names every flag."""

from llm.data.files import open_tokens
from llm.models.case_studies.kimi_linear import KimiLinear
from llm.training.flags import command, parse_arguments
from llm.training.loop import train


@command
def main(arguments: list[str] | None = None) -> None:
    settings = parse_arguments(KimiLinear.Config, arguments)
    data = open_tokens(settings.train.data)  # two memory-mapped arrays of tokens
    train(KimiLinear, settings.model_for(data), settings.train, data)


if __name__ == "__main__":
    main()
