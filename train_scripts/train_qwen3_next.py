"""Train `qwen3_next` (llm/models/case_studies/qwen3_next.py); `--help` names every flag."""

from llm.data.files import open_tokens
from llm.models.case_studies.qwen3_next import Qwen3Next
from llm.training.flags import command, parse_arguments
from llm.training.loop import train


@command
def main(arguments: list[str] | None = None) -> None:
    settings = parse_arguments(Qwen3Next.Config, arguments)
    data = open_tokens(settings.train.data)  # two memory-mapped arrays of tokens
    train(Qwen3Next, settings.model_for(data), settings.train, data)


if __name__ == "__main__":
    main()
