"""Every model by name: tests, scripts and tables go through this dict. A model's config is its `Config`."""

from llm.models.alibi import ALiBiDecoder
from llm.models.attention_sink import AttentionSink
from llm.models.autoregressive_twin import AutoregressiveTwin
from llm.models.baseline import Baseline
from llm.models.big_bird import BigBird
from llm.models.block_diffusion import BlockDiffusion
from llm.models.block_mixture import BlockMixture
from llm.models.case_studies.deepseek_v2 import DeepseekV2
from llm.models.case_studies.deepseek_v3 import DeepseekV3
from llm.models.case_studies.deepseek_v3_2 import DeepseekV32
from llm.models.case_studies.dream import Dream
from llm.models.case_studies.falcon_h1 import FalconH1
from llm.models.case_studies.gemma import Gemma, Gemma2, Gemma3
from llm.models.case_studies.glm4_moe import GLM4MoE
from llm.models.case_studies.gpt2 import GPT2
from llm.models.case_studies.gpt_oss import GPTOSS
from llm.models.case_studies.granitemoehybrid import GraniteMoEHybrid
from llm.models.case_studies.jamba import Jamba
from llm.models.case_studies.kimi_linear import KimiLinear
from llm.models.case_studies.lfm2 import LFM2
from llm.models.case_studies.llada import LLaDA
from llm.models.case_studies.llama import Llama
from llm.models.case_studies.mamba import Mamba2LM, MambaLM
from llm.models.case_studies.minimax import MiniMax
from llm.models.case_studies.ministral3 import Ministral3
from llm.models.case_studies.mistral import Mistral
from llm.models.case_studies.mixtral import Mixtral
from llm.models.case_studies.nemotron_h import NemotronH
from llm.models.case_studies.olmo2 import OLMo2
from llm.models.case_studies.olmo3 import OLMo3
from llm.models.case_studies.phi3 import Phi3
from llm.models.case_studies.qwen2_moe import Qwen2MoE
from llm.models.case_studies.qwen3 import Qwen2, Qwen3
from llm.models.case_studies.qwen3_5 import Qwen35, Qwen35MoE
from llm.models.case_studies.qwen3_moe import Qwen3MoE
from llm.models.case_studies.qwen3_next import Qwen3Next
from llm.models.case_studies.recurrent_gemma import RecurrentGemma
from llm.models.case_studies.sdar import SDAR
from llm.models.case_studies.smollm3 import SmolLM3
from llm.models.delta_net import DeltaNetDecoder
from llm.models.flash_attention import FlashAttentionDecoder
from llm.models.gated_attention import GatedAttentionDecoder
from llm.models.gated_delta_net import GatedDeltaNetDecoder
from llm.models.gated_linear_attention import GatedLinearAttentionDecoder
from llm.models.grouped_query import GroupedQuery
from llm.models.hybrid import Hybrid
from llm.models.kimi_delta import KimiDelta
from llm.models.latent import Latent
from llm.models.layer_norm import LayerNormDecoder
from llm.models.learned_position import LearnedPositionDecoder
from llm.models.linear_attention import LinearAttentionDecoder
from llm.models.loss_free_balancing import LossFreeBalancing
from llm.models.mamba import MambaDecoder
from llm.models.mamba2 import Mamba2Decoder
from llm.models.masked_diffusion import MaskedDiffusion
from llm.models.mixture_of_experts import MixtureOfExperts
from llm.models.multi_query import MultiQuery
from llm.models.native_sparse import NativeSparse
from llm.models.nope import NoPEDecoder
from llm.models.output_norm import OutputNorm
from llm.models.parallel_block import ParallelBlockDecoder
from llm.models.parallel_hybrid import ParallelHybrid
from llm.models.post_norm import PostNorm
from llm.models.qk_norm import QKNormDecoder
from llm.models.relative_position import RelativePositionDecoder
from llm.models.retnet import RetNet
from llm.models.rope import RoPEDecoder
from llm.models.rwkv7 import RWKV7
from llm.models.sandwich_norm import SandwichNorm
from llm.models.sliding_window import SlidingWindow
from llm.models.soft_capping import SoftCapping
from llm.models.sparse import Sparse
from llm.models.streaming import Streaming
from llm.models.swiglu import SwiGLUDecoder
from llm.models.switch_transformer import SwitchTransformer
from llm.models.t5_bias import T5BiasDecoder
from llm.models.transformer import Transformer

MODELS: dict[str, type[Transformer]] = {
    "baseline": Baseline,
    "learned_position": LearnedPositionDecoder,
    "relative_position": RelativePositionDecoder,
    "t5_bias": T5BiasDecoder,
    "rope": RoPEDecoder,
    "alibi": ALiBiDecoder,
    "nope": NoPEDecoder,
    "layer_norm": LayerNormDecoder,
    "post_norm": PostNorm,
    "sandwich_norm": SandwichNorm,
    "output_norm": OutputNorm,
    "parallel_block": ParallelBlockDecoder,
    "qk_norm": QKNormDecoder,
    "multi_query": MultiQuery,
    "grouped_query": GroupedQuery,
    "sliding_window": SlidingWindow,
    "sparse": Sparse,
    "big_bird": BigBird,
    "native_sparse": NativeSparse,
    "block_mixture": BlockMixture,
    "attention_sink": AttentionSink,
    "streaming": Streaming,
    "soft_capping": SoftCapping,
    "gated_attention": GatedAttentionDecoder,
    "latent": Latent,
    "flash_attention": FlashAttentionDecoder,
    "swiglu": SwiGLUDecoder,
    "switch_transformer": SwitchTransformer,
    "mixture_of_experts": MixtureOfExperts,
    "loss_free_balancing": LossFreeBalancing,
    "linear_attention": LinearAttentionDecoder,
    "retnet": RetNet,
    "gated_linear_attention": GatedLinearAttentionDecoder,
    "delta_net": DeltaNetDecoder,
    "gated_delta_net": GatedDeltaNetDecoder,
    "kimi_delta": KimiDelta,
    "mamba": MambaDecoder,
    "mamba2": Mamba2Decoder,
    "rwkv7": RWKV7,
    "hybrid": Hybrid,
    "parallel_hybrid": ParallelHybrid,
    "masked_diffusion": MaskedDiffusion,
    "block_diffusion": BlockDiffusion,
    "autoregressive_twin": AutoregressiveTwin,
    "gpt2": GPT2,
    "llama": Llama,
    "smollm3": SmolLM3,
    "mistral": Mistral,
    "ministral3": Ministral3,
    "phi3": Phi3,
    "qwen2": Qwen2,
    "qwen3": Qwen3,
    "olmo2": OLMo2,
    "olmo3": OLMo3,
    "gemma": Gemma,
    "gemma2": Gemma2,
    "gemma3": Gemma3,
    "deepseek_v2": DeepseekV2,
    "deepseek_v3": DeepseekV3,
    "deepseek_v3_2": DeepseekV32,
    "mixtral": Mixtral,
    "qwen2_moe": Qwen2MoE,
    "qwen3_moe": Qwen3MoE,
    "qwen3_next": Qwen3Next,
    "qwen3_5": Qwen35,
    "qwen3_5_moe": Qwen35MoE,
    "kimi_linear": KimiLinear,
    "minimax": MiniMax,
    "glm4_moe": GLM4MoE,
    "gpt_oss": GPTOSS,
    "mamba_lm": MambaLM,
    "mamba2_lm": Mamba2LM,
    "jamba": Jamba,
    "nemotron_h": NemotronH,
    "falcon_h1": FalconH1,
    "lfm2": LFM2,
    "granitemoehybrid": GraniteMoEHybrid,
    "recurrent_gemma": RecurrentGemma,
    "llada": LLaDA,
    "dream": Dream,
    "sdar": SDAR,
}
