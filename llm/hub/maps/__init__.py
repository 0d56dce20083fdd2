"""Models with published checkpoints: how transformers stores them (PUBLISHED), and their published sizes (SIZES)."""

from llm.config import ModelConfig
from llm.hub.maps import deepseek, gemma, gpt2, gpt_oss, llama, mistral, mixtral, olmo2, qwen3
from llm.hub.tables import Published
from llm.models.transformer import Transformer

FAMILIES = (gpt2, llama, mistral, qwen3, olmo2, gemma, deepseek, mixtral, gpt_oss)
PUBLISHED: dict[type[Transformer], Published] = {
    Model: published for family in FAMILIES for Model, published in family.PUBLISHED.items()
}
SIZES: dict[type[Transformer], dict[str, ModelConfig]] = {
    Model: {name: Model.Config(**size) for name, size in sizes.items()}
    for family in FAMILIES
    for Model, sizes in family.SIZES.items()
}
