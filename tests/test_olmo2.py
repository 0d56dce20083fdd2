"""OLMo 2 is transformers' OLMo 2, and its norms stand where the report puts them."""

import pytest
import torch
from conftest import tiny_model
from parity import assert_parity

from llm.hub.maps import PUBLISHED, SIZES
from llm.hub.tables import read_config
from llm.models.case_studies.olmo2 import OLMo2
from llm.modules.norms import OnceRoundedRMSNorm

LONG = {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 256}
WIDE_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 1024}
CASES = {
    "grouped heads": {},
    "one key head": {"num_key_value_heads": 1},
    "three heads with keys of their own": {"hidden_size": 30, "num_attention_heads": 3, "num_key_value_heads": 3},
    "heads of another width, tied": {"head_dim": 12, "tie_word_embeddings": True},
    "the published base": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rms_norm_eps": 1e-3},
    "linear scaling": {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e3, "factor": 3.0}},
    "YaRN": {**WIDE_HEADS, "rope_parameters": {"rope_type": "yarn", **LONG}},
}


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_olmo2_equals_the_original(config, tmp_path):
    assert_parity(tmp_path, "Olmo2ForCausalLM", **config)


@torch.no_grad()
@pytest.mark.parametrize("module, name", [("olmo2", "Olmo2RMSNorm"), ("gpt_oss", "GptOssRMSNorm")])
def test_in_half_precision_its_norm_is_rounded_once(module, name):
    transformers_module = pytest.importorskip(f"transformers.models.{module}.modeling_{module}")
    theirs, ours = getattr(transformers_module, name)(64, eps=1e-5), OnceRoundedRMSNorm(64, eps=1e-5)
    weight, x = torch.randn(64), 3 * torch.randn(50, 64)
    for dtype in (torch.bfloat16, torch.float16):
        for norm in (theirs, ours):
            norm.to(dtype).weight.copy_(weight)
        assert torch.equal(ours(x.to(dtype)), theirs(x.to(dtype)))


def test_one_norm_covers_the_queries_of_all_heads():
    mixer = tiny_model("olmo2", n_heads=4, n_kv_heads=2).blocks[0].mixer
    assert mixer.q_norm.weight.shape == (128,)
    assert mixer.k_norm.weight.shape == (64,)


def test_a_layer_of_any_size_adds_no_more_than_its_gain(tokens):
    model = tiny_model("olmo2")
    block, x = model.blocks[0], torch.randn(2, 5, 128, dtype=torch.float64)
    positions = torch.arange(5)
    before = block(x, positions)
    for parameter in (block.mixer.o_proj.weight, block.ffn.down_proj.weight):
        parameter.data *= 1000
    torch.testing.assert_close(block(x, positions), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("olmo2-1b", 1_484_916_736),
        ("olmo2-7b", 7_298_617_344),
        ("olmo2-13b", 13_716_198_400),
        ("olmo2-32b", 32_234_279_936),
    ],
)
def test_published_sizes_have_the_published_number_of_parameters(name, parameters):
    with torch.device("meta"):
        model = OLMo2(SIZES[OLMo2][name])
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_the_config_of_the_published_7b_model_is_that_of_sizes():
    config = dict(
        **dict(architectures=["Olmo2ForCausalLM"], attention_bias=False, attention_dropout=0.0, eos_token_id=100257),
        **dict(hidden_act="silu", hidden_size=4096, initializer_range=0.02, intermediate_size=11008),
        **dict(max_position_embeddings=4096, model_type="olmo2", num_attention_heads=32, num_hidden_layers=32),
        **dict(num_key_value_heads=32, pad_token_id=100277, rms_norm_eps=1e-06, rope_scaling=None, rope_theta=500000),
        **dict(tie_word_embeddings=False, torch_dtype="float32", use_cache=True, vocab_size=100352),
    )
    assert OLMo2.Config(**read_config(PUBLISHED[OLMo2], config)) == SIZES[OLMo2]["olmo2-7b"]
