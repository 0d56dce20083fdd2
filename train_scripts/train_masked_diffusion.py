"""Train `masked_diffusion` (llm/models/masked_diffusion.py); `--help` names every flag."""

from llm.data.files import open_tokens
from llm.models.masked_diffusion import MaskedDiffusion
from llm.training.flags import command, parse_arguments
from llm.training.loop import train


@command
def main(arguments: list[str] | None = None) -> None:
    settings = parse_arguments(MaskedDiffusion.Config, arguments)
    data = open_tokens(settings.train.data)  # two memory-mapped arrays of tokens
    train(MaskedDiffusion, settings.model_for(data), settings.train, data)


if __name__ == "__main__":
    main()
