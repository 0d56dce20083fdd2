"""The contract that every model in MODELS keeps."""

import copy
import inspect
import itertools
import math
import subprocess
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import ClassVar, get_origin, get_type_hints

import pytest
import torch
from conftest import VOCABULARY, redraw, tiny_model

from llm.config import ModelConfig, TrainConfig
from llm.models import MODELS
from llm.modules.diffusion.unmasking import Unmasking
from llm.modules.ffn.router import Router


def test_logits_have_the_right_shape(model, tokens):
    logits = model(tokens)
    assert logits.shape == (*tokens.shape, VOCABULARY)
    assert logits.isfinite().all()


def test_the_future_does_not_reach_the_past(causal_model, tokens):
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % VOCABULARY
    before, after = causal_model(tokens), causal_model(changed)
    # experts see groups of other sizes, so the last bit may differ
    torch.testing.assert_close(before[:, :-1], after[:, :-1], rtol=0, atol=1e-12)
    assert not torch.allclose(before[:, -1], after[:, -1])


@pytest.mark.parametrize("parts", [[1] * 24, [24], [7, 1, 16], [20, 1, 1, 1, 1]])
def test_cached_logits_equal_uncached_ones(causal_model, tokens, parts):
    cache = causal_model.make_cache(len(tokens), tokens.shape[1])
    cached = torch.cat([causal_model(part, cache) for part in tokens.split(parts, 1)], 1)
    torch.testing.assert_close(cached, causal_model(tokens), rtol=0, atol=1e-5)


def test_a_padded_batch_gives_what_each_prompt_gives_alone(causal_model, tokens):
    padding = torch.tensor([0, 5, 11])
    cache = causal_model.make_cache(len(tokens), tokens.shape[1], padding)
    together = torch.cat([causal_model(part, cache) for part in tokens.split([13, 1, 1, 9], 1)], 1)
    for row, n in enumerate(padding):
        alone = causal_model(tokens[row : row + 1, n:])
        torch.testing.assert_close(together[row, n:], alone[0], rtol=0, atol=1e-5)


def test_greedy_generation_equals_recomputing_everything(causal_model, tokens):
    prompt = tokens[:, :9]
    generated = torch.stack(list(causal_model.generate(prompt, 12, lambda logits: logits.argmax(-1))), 1)
    text = prompt
    for _ in range(12):
        text = torch.cat([text, causal_model(text)[:, -1:].argmax(-1)], 1)
    assert torch.equal(generated, text[:, 9:])


def test_generation_stops_where_the_context_is_full(causal_model, tokens):
    steps = list(causal_model.generate(tokens, 1000, lambda logits: logits.argmax(-1)))
    n_free = causal_model.config.max_seq_len - tokens.shape[1]
    assert len(steps) == n_free + 1  # the last position predicts a token, too


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_gets_a_gradient(name):
    """In stacked experts each expert's part, on a batch in which each expert gets tokens."""
    # a router's bias, as re-drawn, leaves some of GPT-OSS's 16 experts alone
    model = tiny_model(name, **({"n_experts": 8} if name == "gpt_oss" else {})).train()
    loss, parts = model.loss(torch.randint(VOCABULARY, (16, 49), generator=torch.Generator().manual_seed(1)))
    for router in (module for module in model.modules() if isinstance(module, Router)):
        assert (router.total[: router.n_experts] > 0).all(), "an expert got no tokens"
    loss.backward()
    torch.testing.assert_close(loss.detach(), parts["ce"] + parts["aux"])
    without = []
    for name, parameter in model.named_parameters():
        slices = parameter.grad if ".experts." in name and parameter.grad is not None else [parameter.grad]
        without += [(name, i) for i, grad in enumerate(slices) if grad is None or not grad.any()]
    assert not without


def test_the_loss_is_the_cross_entropy_of_the_next_token(causal_model, tokens):
    _, parts = causal_model.loss(tokens)
    log_p = causal_model(tokens[:, :-1]).log_softmax(-1)
    naive = [-log_p[b, t, tokens[b, t + 1]] for b in range(len(tokens)) for t in range(tokens.shape[1] - 1)]
    torch.testing.assert_close(parts["ce"].double(), torch.stack(naive).mean(), rtol=0, atol=1e-5)


def test_a_copy_is_independent_and_equal(model, tokens):
    model.train()
    model.loss(tokens[:, :21])  # 20 targets, which are whole blocks
    model.after_step()
    twin = copy.deepcopy(model)
    assert torch.equal(twin.eval()(tokens), model.eval()(tokens))
    redraw(twin)
    assert not torch.equal(twin(tokens), model(tokens))


def test_weights_survive_a_round_trip_through_the_meta_device(model, tokens):
    with torch.device("meta"):
        twin = type(model)(model.config)
    twin.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(twin.eval()(tokens), model(tokens))


@pytest.mark.parametrize("name", MODELS)
def test_the_config_survives_a_round_trip(name):
    Config = MODELS[name].Config
    config = replace(Config(), **Config.small, vocab_size=321)
    assert Config(**asdict(config)) == config


def settings_that_are_no_fields(Config) -> list[str]:
    """Public values of a class that `Config(name=..)` would not take: `n_heads = 16` without an annotation is one."""
    public = {name: value for cls in Config.__mro__ for name, value in vars(cls).items() if not name.startswith("_")}
    constants = {name for name, hint in get_type_hints(Config).items() if get_origin(hint) is ClassVar}
    known = {field.name for field in fields(Config)} | constants
    return [n for n, v in public.items() if n not in known and not isinstance(v, property) and not inspect.isroutine(v)]


@pytest.mark.parametrize("name", MODELS)
def test_every_setting_of_a_config_is_a_field(name):
    assert settings_that_are_no_fields(MODELS[name].Config) == []


MAY_BE_ZERO = {
    *("n_global", "n_random", "n_shared_experts", "n_dense_layers", "n_mtp"),  # parts that may be absent
    *("attention_offset", "expert_offset", "mask_token"),  # numbers of a layer and of a token
}


@pytest.mark.parametrize("name", MODELS)
def test_a_size_of_0_or_below_is_refused_by_its_name_and_flag(name):
    """By the Config or when the model is made, which is before any data is read."""
    Model = MODELS[name]
    for field, hint in get_type_hints(Model.Config).items():
        if hint not in (int, int | None) or field == "mask_seed":
            continue
        absent = field in MAY_BE_ZERO or (name, field) == ("granitemoehybrid", "n_experts")  # 0: a dense layer
        for value in (-1,) if absent else (0, -1):
            with pytest.raises(ValueError, match=rf"\b{field} = {value}\b") as error, torch.device("meta"):
                Model(Model.Config(**Model.Config.small | {field: value}))
            assert "--model." + field.replace("_", "-") in str(error.value)


@pytest.mark.parametrize(
    "name, sizes, message",
    [
        ("hybrid", dict(layer_types=["mamba"]), "layer_types = .'mamba',. must be one or several of gated_delta_net"),
        ("delta_net", dict(max_beta=3.0), "max_beta = 3.0 must be .* at most 2"),
        ("hybrid", dict(n_attention_heads=3), "n_attention_heads = 3 does not divide .*--model.n-attention-heads"),
        ("gated_linear_attention", dict(d_model=12, n_heads=12), "n_heads = 12 .* = 1 .*even.*--model.n-heads"),
        ("gated_linear_attention", dict(d_model=100, n_heads=4), "n_heads = 4 .* = 25 .*even.*--model.d-model"),
        ("gated_delta_net", dict(d_model=12, n_heads=12), "n_heads = 12 .* = 1 .*even.*--model.n-heads"),
        ("hybrid", dict(d_model=12, n_heads=12, n_attention_heads=4), "n_heads = 12 .* = 1 .*even.*--model.n-heads"),
    ],
)
def test_heads_into_which_the_width_does_not_go_are_refused(name, sizes, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(name, **sizes)


def test_a_setting_without_an_annotation_is_found():
    @dataclass(frozen=True)
    class Config(ModelConfig):
        n_heads = 16
        sizes: ClassVar[dict] = {}

    assert settings_that_are_no_fields(Config) == ["n_heads"]


def test_importing_the_models_does_not_load_the_compiler():
    """torch._dynamo takes seconds and 170 MB: what compiles nothing should not pay for it."""
    code = "import sys, llm.models; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0


@pytest.mark.parametrize("name", MODELS)
def test_the_head_may_be_untied(name, tokens):
    model = tiny_model(name, tie_embeddings=False)
    assert model(tokens).isfinite().all()
    assert model.lm_head.weight.shape == (VOCABULARY, model.config.d_model)


@pytest.mark.parametrize("name", [name for name, Model in MODELS.items() if Model.causal])
def test_it_can_learn_one_batch_by_heart(name):
    Model = MODELS[name]
    torch.manual_seed(0)
    # a tied head begins by repeating the token it has just read, which takes long to unlearn
    sizes = {**Model.Config.small, "vocab_size": 31, "n_layers": 2, "max_seq_len": 16, "tie_embeddings": False}
    model = Model(Model.Config(**sizes))
    batch = torch.randint(31, (4, 17), generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    # decays to 0: at a constant rate a token that changes its expert at the end may cost a tenth of a nat
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=80)
    for _ in range(80):
        optimizer.zero_grad()
        model.loss(batch)[0].backward()
        optimizer.step()
        model.after_step()
        schedule.step()
    assert model.eval().loss(batch)[1]["ce"] < 0.1


@pytest.mark.parametrize("Config", [TrainConfig, Unmasking, *dict.fromkeys(Model.Config for Model in MODELS.values())])
def test_no_number_of_a_config_may_be_nan_or_infinite(Config):
    """nan passes checks such as `value < 0`, which are never true of it."""
    whole = Config()
    names = [field.name for field in fields(whole) if isinstance(getattr(whole, field.name), float)]
    assert names
    for name, value in itertools.product(names, [math.nan, math.inf, -math.inf]):
        with pytest.raises(
            ValueError, match=rf"{name} = {value} must be a finite number \(--.*{name.replace('_', '-')}"
        ):
            replace(whole, **{name: value})


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        (
            "falcon_h1",
            {"ssm_multipliers": (1.0, math.nan, 1.0, 1.0, 1.0)},
            r"finite number \(--model\.ssm-multipliers\)",
        ),
        ("falcon_h1", {"mlp_multipliers": (1.0,)}, r"must be 2 numbers \(--model\.mlp-multipliers\)"),
        ("falcon_h1", {"n_mamba_groups": 3}, r"n_mamba_groups = 3 does not divide .*\(--model\.n-mamba-groups\)"),
        ("nemotron_h", {"n_mamba_groups": 3}, r"n_mamba_groups = 3 does not divide .*\(--model\.n-mamba-groups\)"),
        ("granitemoehybrid", {"n_state_groups": 3}, r"n_state_groups = 3 does not .*\(--model\.n-state-groups\)"),
    ],
)
def test_what_hybrids_cannot_be_is_named_before_they_are_built(name, wrong, message):
    with pytest.raises(ValueError, match=message):
        MODELS[name].Config(**wrong)
