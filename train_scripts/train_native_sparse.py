"""Train `native_sparse` (llm/models/native_sparse.py); `--help` names every flag."""

from llm.data.files import open_tokens
from llm.models.native_sparse import NativeSparse
from llm.training.flags import command, parse_arguments
from llm.training.loop import train


@command
def main(arguments: list[str] | None = None) -> None:
    settings = parse_arguments(NativeSparse.Config, arguments)
    data = open_tokens(settings.train.data)  # two memory-mapped arrays of tokens
    train(NativeSparse, settings.model_for(data), settings.train, data)


if __name__ == "__main__":
    main()
