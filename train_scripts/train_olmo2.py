"""Train `olmo2` (llm/models/case_studies/olmo2.py); `--help` names every flag."""

from llm.data.files import open_tokens
from llm.models.case_studies.olmo2 import OLMo2
from llm.training.flags import command, parse_arguments
from llm.training.loop import train


@command
def main(arguments: list[str] | None = None) -> None:
    settings = parse_arguments(OLMo2.Config, arguments)
    data = open_tokens(settings.train.data)  # two memory-mapped arrays of tokens
    train(OLMo2, settings.model_for(data), settings.train, data)


if __name__ == "__main__":
    main()
