"""Llama, Mistral, Qwen2 and Qwen3 against transformers: logits, greedy text, gradients, export; published sizes."""

import pytest
import torch
from parity import (
    assert_parity,
    assert_same_gradients,
    assert_same_logits,
    assert_survives_export,
    draw_tokens,
    logits,
    twins,
)

from llm.generate.sampling import generate_tokens, greedy
from llm.hub import maps
from llm.models.case_studies.llama import Llama
from llm.models.case_studies.mistral import Mistral
from llm.models.case_studies.qwen3 import Qwen2, Qwen3

PLAIN = {"rope_type": "default", "rope_theta": 500.0}
LONG = {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 256}
BANDS = {"rope_type": "llama3", **LONG, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
WIDE_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 1024}
LLAMAS = {
    "grouped heads": {"rope_parameters": PLAIN},
    "one key head": {"num_key_value_heads": 1},
    "as many key heads as query heads": {"num_key_value_heads": 4},
    "an odd number of heads": {"hidden_size": 30, "num_attention_heads": 3, "num_key_value_heads": 3},
    "heads of another width": {"head_dim": 12},
    "a tied head": {"tie_word_embeddings": True},
    "linear scaling": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "YaRN": {**WIDE_HEADS, "rope_parameters": {"rope_type": "yarn", **LONG}},
    "YaRN with its own temperature": {
        **WIDE_HEADS,
        "rope_parameters": {"rope_type": "yarn", **LONG, "attention_factor": 1.5, "beta_fast": 16.0, "truncate": False},
    },
    "Llama 3's bands": {**WIDE_HEADS, "rope_parameters": BANDS},
}


@pytest.mark.parametrize("config", LLAMAS.values(), ids=LLAMAS)
def test_llama_equals_the_original(config, tmp_path):
    assert_parity(tmp_path, "LlamaForCausalLM", **config)


def test_llama_with_dynamic_ntk_equals_the_original_below_and_beyond_the_trained_length(tmp_path):
    """Without a cache, whose keys keep the angles of their time. transformers trains its config's length."""
    scaling = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    theirs, ours = twins(tmp_path, "LlamaForCausalLM", max_position_embeddings=16, rope_parameters=scaling)
    assert ours.config.max_seq_len == 64
    for n_tokens in (12, 40):
        assert_same_logits(theirs, ours, n_tokens)
        assert_survives_export(theirs, ours, tmp_path / str(n_tokens), n_tokens)
    assert_same_gradients(theirs, ours, tmp_path, n_tokens=40)


def test_with_dynamic_ntk_a_cached_text_equals_the_originals_cached_text_and_ignores_its_neighbours(tmp_path):
    """A prompt below the trained length of 16 and one above it, both decoded to 40 tokens, beyond 16."""
    scaling = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    sizes = {"max_position_embeddings": 16, "rope_parameters": scaling}
    for prompt in (6, 20):
        theirs, ours = twins(tmp_path / str(prompt), "LlamaForCausalLM", **sizes)
        text = draw_tokens(40)[:1]
        cache, past, expected, got = ours.make_cache(1, 40), None, [], []
        with torch.no_grad():
            for part in (text[:, :prompt], *text[:, prompt:].split(1, 1)):
                output = theirs(part, past_key_values=past, use_cache=True)
                past = output.past_key_values
                expected.append(output.logits)
                got.append(ours(part, cache))
        torch.testing.assert_close(torch.cat(got, 1), torch.cat(expected, 1), rtol=0, atol=1e-5)
    short, long = text[0, :6].tolist(), text[0, :30].tolist()
    alone = [step[0] for step in generate_tokens(ours, [short], 9, greedy, stop=())]
    assert [step[0] for step in generate_tokens(ours, [short, long], 9, greedy, stop=())] == alone


MISTRALS = {
    "a window shorter than the text": {"sliding_window": 6},
    "heads of another width and one key head": {"sliding_window": 5, "head_dim": 12, "num_key_value_heads": 1},
    "a tied head": {"sliding_window": 8, "tie_word_embeddings": True},
    "no window": {"sliding_window": None},
    "an odd number of heads with keys of their own": {
        **dict(hidden_size=30, num_attention_heads=3, num_key_value_heads=3, sliding_window=6)
    },
    "Llama 3's bands": {**WIDE_HEADS, "sliding_window": 6, "rope_parameters": BANDS},
}


@pytest.mark.parametrize("config", MISTRALS.values(), ids=MISTRALS)
def test_mistral_equals_the_original_past_its_window(config, tmp_path):
    assert_parity(tmp_path, "MistralForCausalLM", **{"rope_parameters": PLAIN} | config)


def test_mistrals_window_matters_and_its_cache_holds_no_more(tmp_path):
    _, ours = twins(tmp_path, "MistralForCausalLM", sliding_window=6)
    assert [layer["k"].shape[1] for layer in ours.make_cache(2, 60).layers] == [6, 6, 6]
    tokens = draw_tokens(40)
    changed = tokens.clone()
    changed[:, 0] = (changed[:, 0] + 1) % 97
    same = (ours(tokens) == ours(changed)).all(-1)  # 3 layers of 6 tokens: 15 tokens back and no further
    assert same[:, 16:].all() and not same[:, :16].any()


QWENS = {
    "grouped heads": {"rope_parameters": PLAIN},
    "a tied head and one key head": {"tie_word_embeddings": True, "num_key_value_heads": 1},
    "YaRN": {"num_attention_heads": 1, "num_key_value_heads": 1, "rope_parameters": {"rope_type": "yarn", **LONG}},
    "an odd number of heads": {"hidden_size": 30, "num_attention_heads": 3, "num_key_value_heads": 3},
}


@pytest.mark.parametrize("config", QWENS.values(), ids=QWENS)
def test_qwen2_equals_the_original(config, tmp_path):
    _, ours = assert_parity(tmp_path, "Qwen2ForCausalLM", **config)
    assert ours.blocks[0].mixer.k_proj.bias is not None and ours.blocks[0].mixer.o_proj.bias is None


QWEN3S = {
    "heads as wide as a share of the stream": {"head_dim": 8, "rope_parameters": PLAIN},
    "heads of another width, an odd number": {"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 16},
    "a tied head and one key head": {"head_dim": 12, "tie_word_embeddings": True, "num_key_value_heads": 1},
    "YaRN": {**WIDE_HEADS, "rope_parameters": {"rope_type": "yarn", **LONG}},
}


@pytest.mark.parametrize("config", QWEN3S.values(), ids=QWEN3S)
def test_qwen3_equals_the_original(config, tmp_path):
    assert_parity(tmp_path, "Qwen3ForCausalLM", **config)


def test_both_spellings_of_rope_settings_are_the_same_model(tmp_path):
    """What transformers 4 wrote beside what 5 writes."""
    import json

    from llm.hub.load import load_pretrained

    scaling = {"factor": 4.0, "original_max_position_embeddings": 256}
    theirs, ours = twins(
        tmp_path, "LlamaForCausalLM", **WIDE_HEADS, rope_parameters={"rope_type": "yarn", "rope_theta": 5e3, **scaling}
    )
    file = tmp_path / "theirs" / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    del config["rope_parameters"]
    for key in ("type", "rope_type"):
        older = config | {"rope_theta": 5e3, "rope_scaling": {key: "yarn", **scaling}}
        file.write_text(json.dumps(older), encoding="utf-8")
        again = load_pretrained(file.parent)
        assert again.config == ours.config
    assert_same_logits(theirs, again)
    plain = config | {"rope_theta": 5e3, "rope_scaling": None}
    file.write_text(json.dumps(plain), encoding="utf-8")
    tokens = draw_tokens(40)
    assert (load_pretrained(file.parent)(tokens) - logits(theirs, tokens)).abs().max() > 1e-2


PUBLISHED = {
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "llama3.3-70b": 70_553_706_496,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.2": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "qwen2-0.5b": 494_032_768,
    "qwen2-1.5b": 1_543_714_304,
    "qwen2-7b": 7_615_616_512,
    "qwen2-72b": 72_706_203_648,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
}
MODEL_OF = {name: Model for Model in (Llama, Mistral, Qwen2, Qwen3) for name in maps.SIZES[Model]}


def test_every_published_size_is_tested():
    assert MODEL_OF.keys() == PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_the_published_number_of_parameters(name):
    Model = MODEL_OF[name]
    with torch.device("meta"):
        model = Model(maps.SIZES[Model][name])
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name]
