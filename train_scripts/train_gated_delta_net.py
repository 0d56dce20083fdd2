"""Train `gated_delta_net` (llm/models/gated_delta_net.py); `--help` names every flag."""

from llm.data.files import open_tokens
from llm.models.gated_delta_net import GatedDeltaNetDecoder
from llm.training.flags import command, parse_arguments
from llm.training.loop import train


@command
def main(arguments: list[str] | None = None) -> None:
    settings = parse_arguments(GatedDeltaNetDecoder.Config, arguments)
    data = open_tokens(settings.train.data)  # two memory-mapped arrays of tokens
    train(GatedDeltaNetDecoder, settings.model_for(data), settings.train, data)


if __name__ == "__main__":
    main()
