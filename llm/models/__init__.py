"""Every model by name: tests, scripts and tables go through this dict."""

from llm.models.alibi import ALiBiConfig, ALiBiDecoder
from llm.models.attention_sink import AttentionSink, AttentionSinkConfig
from llm.models.baseline import Baseline, BaselineConfig
from llm.models.big_bird import BigBird, BigBirdConfig
from llm.models.deepseek import DeepseekV2, DeepseekV2Config, DeepseekV3, DeepseekV3Config
from llm.models.flash_attention import FlashAttentionConfig, FlashAttentionDecoder
from llm.models.gated_attention import GatedAttentionConfig, GatedAttentionDecoder
from llm.models.gemma import Gemma2, Gemma2Config, Gemma3, Gemma3Config
from llm.models.gpt2 import GPT2, GPT2Config
from llm.models.gpt_oss import GPTOSS, GPTOSSConfig
from llm.models.grouped_query import GroupedQuery, GroupedQueryConfig
from llm.models.latent import Latent, LatentConfig
from llm.models.layer_norm import LayerNormConfig, LayerNormDecoder
from llm.models.learned_position import LearnedPositionConfig, LearnedPositionDecoder
from llm.models.llama import Llama, LlamaConfig
from llm.models.loss_free_balancing import LossFreeBalancing, LossFreeBalancingConfig
from llm.models.mistral import Mistral, MistralConfig
from llm.models.mixtral import Mixtral, MixtralConfig
from llm.models.mixture_of_experts import MixtureOfExperts, MixtureOfExpertsConfig
from llm.models.multi_query import MultiQuery, MultiQueryConfig
from llm.models.nope import NoPEConfig, NoPEDecoder
from llm.models.olmo2 import OLMo2, OLMo2Config
from llm.models.output_norm import OutputNorm, OutputNormConfig
from llm.models.parallel_block import ParallelBlockConfig, ParallelBlockDecoder
from llm.models.post_norm import PostNorm, PostNormConfig
from llm.models.qk_norm import QKNormConfig, QKNormDecoder
from llm.models.qwen3 import Qwen2, Qwen2Config, Qwen3, Qwen3Config
from llm.models.qwen3_moe import Qwen3MoE, Qwen3MoEConfig
from llm.models.relative_position import RelativePositionConfig, RelativePositionDecoder
from llm.models.rope import RoPEConfig, RoPEDecoder
from llm.models.sandwich_norm import SandwichNorm, SandwichNormConfig
from llm.models.sliding_window import SlidingWindow, SlidingWindowConfig
from llm.models.soft_capping import SoftCapping, SoftCappingConfig
from llm.models.sparse import Sparse, SparseConfig
from llm.models.streaming import Streaming, StreamingConfig
from llm.models.swiglu import SwiGLUConfig, SwiGLUDecoder
from llm.models.switch_transformer import SwitchTransformer, SwitchTransformerConfig
from llm.models.t5_bias import T5BiasConfig, T5BiasDecoder

MODELS = {
    "baseline": (Baseline, BaselineConfig),
    "learned_position": (LearnedPositionDecoder, LearnedPositionConfig),
    "relative_position": (RelativePositionDecoder, RelativePositionConfig),
    "t5_bias": (T5BiasDecoder, T5BiasConfig),
    "rope": (RoPEDecoder, RoPEConfig),
    "alibi": (ALiBiDecoder, ALiBiConfig),
    "nope": (NoPEDecoder, NoPEConfig),
    "layer_norm": (LayerNormDecoder, LayerNormConfig),
    "post_norm": (PostNorm, PostNormConfig),
    "sandwich_norm": (SandwichNorm, SandwichNormConfig),
    "output_norm": (OutputNorm, OutputNormConfig),
    "parallel_block": (ParallelBlockDecoder, ParallelBlockConfig),
    "qk_norm": (QKNormDecoder, QKNormConfig),
    "multi_query": (MultiQuery, MultiQueryConfig),
    "grouped_query": (GroupedQuery, GroupedQueryConfig),
    "sliding_window": (SlidingWindow, SlidingWindowConfig),
    "sparse": (Sparse, SparseConfig),
    "big_bird": (BigBird, BigBirdConfig),
    "attention_sink": (AttentionSink, AttentionSinkConfig),
    "streaming": (Streaming, StreamingConfig),
    "soft_capping": (SoftCapping, SoftCappingConfig),
    "gated_attention": (GatedAttentionDecoder, GatedAttentionConfig),
    "latent": (Latent, LatentConfig),
    "flash_attention": (FlashAttentionDecoder, FlashAttentionConfig),
    "swiglu": (SwiGLUDecoder, SwiGLUConfig),
    "switch_transformer": (SwitchTransformer, SwitchTransformerConfig),
    "mixture_of_experts": (MixtureOfExperts, MixtureOfExpertsConfig),
    "loss_free_balancing": (LossFreeBalancing, LossFreeBalancingConfig),
    "gpt2": (GPT2, GPT2Config),
    "llama": (Llama, LlamaConfig),
    "mistral": (Mistral, MistralConfig),
    "qwen2": (Qwen2, Qwen2Config),
    "qwen3": (Qwen3, Qwen3Config),
    "olmo2": (OLMo2, OLMo2Config),
    "gemma2": (Gemma2, Gemma2Config),
    "gemma3": (Gemma3, Gemma3Config),
    "deepseek_v2": (DeepseekV2, DeepseekV2Config),
    "deepseek_v3": (DeepseekV3, DeepseekV3Config),
    "mixtral": (Mixtral, MixtralConfig),
    "qwen3_moe": (Qwen3MoE, Qwen3MoEConfig),
    "gpt_oss": (GPTOSS, GPTOSSConfig),
}
