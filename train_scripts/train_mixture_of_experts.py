"""Train `mixture_of_experts` (llm/models/mixture_of_experts.py); `--help` names every flag."""

from llm.data import open_tokens
from llm.flags import command, parse_arguments
from llm.models.mixture_of_experts import MixtureOfExperts, MixtureOfExpertsConfig
from llm.train import train


@command
def main(arguments: list[str] | None = None) -> None:
    settings = parse_arguments(MixtureOfExpertsConfig, arguments)
    data = open_tokens(settings.train.data)  # two memory-mapped arrays of tokens
    train(MixtureOfExperts, settings.model_for(data), settings.train, data)


if __name__ == "__main__":
    main()
