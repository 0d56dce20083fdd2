"""Train `glm4_moe` (llm/models/case_studies/glm4_moe.py); `--help` names every flag."""

from llm.data.files import open_tokens
from llm.models.case_studies.glm4_moe import GLM4MoE
from llm.training.flags import command, parse_arguments
from llm.training.loop import train


@command
def main(arguments: list[str] | None = None) -> None:
    settings = parse_arguments(GLM4MoE.Config, arguments)
    data = open_tokens(settings.train.data)  # two memory-mapped arrays of tokens
    train(GLM4MoE, settings.model_for(data), settings.train, data)


if __name__ == "__main__":
    main()
