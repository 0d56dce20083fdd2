"""Models with published checkpoints: how transformers stores them (PUBLISHED), and their published sizes (SIZES)."""

from llm.config import ModelConfig
from llm.hub.maps import (
    deepseek,
    diffusion,
    falcon_h1,
    gemma,
    glm4_moe,
    gpt2,
    gpt_oss,
    granitemoehybrid,
    jamba,
    kimi_linear,
    lfm2,
    llama,
    mamba,
    minimax,
    ministral3,
    mistral,
    mixtral,
    nemotron_h,
    olmo2,
    phi3,
    qwen3,
    qwen3_5,
    qwen3_next,
    recurrent_gemma,
    smollm3,
)
from llm.hub.tables import Published
from llm.models.transformer import Transformer

FAMILIES = (
    gpt2,
    llama,
    smollm3,
    mistral,
    ministral3,
    phi3,
    qwen3,
    qwen3_next,
    qwen3_5,
    olmo2,
    gemma,
    deepseek,
    kimi_linear,
    glm4_moe,
    mixtral,
    minimax,
    gpt_oss,
    mamba,
    jamba,
    nemotron_h,
    falcon_h1,
    lfm2,
    granitemoehybrid,
    recurrent_gemma,
    diffusion,
)
PUBLISHED: dict[type[Transformer], Published] = {
    Model: published for family in FAMILIES for Model, published in family.PUBLISHED.items()
}
BY_TYPE: dict[str, tuple[type[Transformer], Published]] = {
    published.model_type: (Model, published) for Model, published in PUBLISHED.items()
} | {
    published.model_type: (Model, published)
    for family in FAMILIES
    for Model, published in getattr(family, "READ_ONLY", ())
}
"""model_type -> the model and how it is stored. What is in `READ_ONLY` of a family is read and never written."""
SIZES: dict[type[Transformer], dict[str, ModelConfig]] = {
    Model: {name: Model.Config(**size) for name, size in sizes.items()}
    for family in FAMILIES
    for Model, sizes in family.SIZES.items()
}
