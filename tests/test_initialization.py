"""Every entry of the table of standard deviations, measured on what is really drawn."""

from math import sqrt
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
from torch import nn

from llm.analysis import plot_initialization
from llm.config import Initialization
from llm.models import MODELS
from llm.modules.initialization import SCHEMES, initialize
from llm.modules.norms import LayerNorm
from llm.modules.position_encoding.sinusoidal import sinusoidal

N_LAYERS = 6
DEPTH = sqrt(2 * N_LAYERS)
IN, OUT, N_EXPERTS, VOCABULARY = 120, 180, 40, 300


class OneOfEach(nn.Module):
    """Every kind of parameter; no two sizes alike, so that a fan taken from the wrong axis shows."""

    def __init__(self):
        super().__init__()
        self.tok_embed = nn.Embedding(VOCABULARY, IN)
        self.q_proj = nn.Linear(IN, OUT)
        self.o_proj = nn.Linear(OUT, IN)
        self.down_proj_norm = LayerNorm(IN)
        self.experts = nn.Module()
        self.experts.up_proj = nn.Parameter(torch.full((N_EXPERTS, OUT, IN), 7.0))
        self.experts.down_proj = nn.Parameter(torch.full((N_EXPERTS, IN, OUT), 7.0))
        self.experts.down_proj_bias = nn.Parameter(torch.full((N_EXPERTS, IN), 7.0))
        self.router = nn.Linear(IN, 64)
        self.sinks = nn.Parameter(torch.full((8,), 7.0))
        self.gate_proj = nn.Parameter(torch.full((8,), 7.0))
        self.lm_head = nn.Linear(IN, VOCABULARY, bias=False)


BOTH_FANS = sqrt(2 / (IN + OUT))
# scheme -> q_proj (in -> out), o_proj (out -> in), experts' up_proj (in -> out), experts' down_proj (out -> in)
TABLE = {
    "normal": (0.02, 0.02 / DEPTH, 0.02, 0.02 / DEPTH),
    "truncated_normal": (0.987 / sqrt(IN), 0.987 / sqrt(OUT) / DEPTH, 0.987 / sqrt(IN), 0.987 / sqrt(OUT) / DEPTH),
    "xavier": (BOTH_FANS, BOTH_FANS, BOTH_FANS, BOTH_FANS),
    "kaiming": (sqrt(2 / IN), sqrt(2 / OUT), sqrt(2 / IN), sqrt(2 / OUT)),
    "zero_output": (0.02, 0.0, 0.02, 0.0),
}


def drawn(scheme: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    module = OneOfEach()
    initialize(module, scheme, N_LAYERS, embedding_std=0.3)
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def test_every_scheme_can_be_asked_for_and_is_in_the_table():
    assert get_args(Initialization) == tuple(SCHEMES) == tuple(TABLE)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_standard_deviations_are_those_of_the_table(scheme):
    parameters = drawn(scheme)
    names = ["q_proj.weight", "o_proj.weight", "experts.up_proj", "experts.down_proj"]
    expected = dict(zip(names, TABLE[scheme], strict=True))
    expected |= {"tok_embed.weight": 0.3, "lm_head.weight": 0.02, "router.weight": 0.02}
    for name, std in expected.items():
        draw = parameters[name]
        assert draw.std().item() == pytest.approx(std, rel=0.025), name  # 3 errors of the smallest sample
        assert abs(draw.mean().item()) <= 4 * std / sqrt(draw.numel()), name


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_expert_is_drawn_as_a_matrix_of_its_own(scheme):
    experts = drawn(scheme)["experts.up_proj"]
    torch.testing.assert_close(experts.std((1, 2)), experts.std().expand(N_EXPERTS), rtol=0.03, atol=0)
    assert not torch.equal(experts[0], experts[1])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_biases_become_zero_and_vectors_stay_as_their_modules_set_them(scheme):
    parameters = drawn(scheme)
    for name in ("q_proj.bias", "o_proj.bias", "router.bias", "experts.down_proj_bias", "down_proj_norm.bias"):
        assert not parameters[name].any(), name
    assert (parameters["sinks"] == 7).all() and (parameters["gate_proj"] == 7).all()
    assert (parameters["down_proj_norm.weight"] == 1).all()


def test_the_distributions_have_the_shape_that_the_table_says():
    def peak(scheme):  # largest number, in standard deviations
        draw = drawn(scheme)["experts.up_proj"]
        return (draw.abs().max() / draw.std()).item()

    assert peak("normal") > 4
    assert peak("truncated_normal") == pytest.approx(3 / 0.987, rel=0.01)
    assert peak("xavier") == pytest.approx(sqrt(3), rel=0.01)


def test_an_unknown_scheme_is_refused_with_the_schemes_and_the_flag():
    with pytest.raises(ValueError, match=r"'orthogonal'.*zero_output.*--model\.initialization"):
        initialize(OneOfEach(), "orthogonal", N_LAYERS)


@pytest.mark.parametrize("name", MODELS)
def test_every_weight_of_every_model_is_drawn_under_every_scheme(name):
    """A linear layer that is neither a `.._proj` nor meant to begin at 0.02 would be seen here."""
    Model = MODELS[name]
    for scheme in SCHEMES:
        torch.manual_seed(0)
        sizes = {**Model.Config.small, "n_layers": 2, "vocab_size": 97, "max_seq_len": 64}
        model = Model(Model.Config(**sizes, initialization=scheme))
        own = {p for module in model.modules() if hasattr(module, "init_weights") for p in module.parameters()}
        for path, module in model.named_modules():
            not_ours = path.endswith(("router", "lm_head", "shared.gate"))
            if not isinstance(module, nn.Linear) or not_ours or module.weight in own:
                continue
            assert path.endswith("_proj"), f"{path} is drawn with 0.02 whatever the scheme"
            if path.endswith(("o_proj", "down_proj")) and scheme == "zero_output":
                assert not module.weight.any(), path
            if scheme == "kaiming":
                factor = 1 / sqrt(module.out_features / 4) if name == "t5_bias" and path.endswith("q_proj") else 1
                expected = factor * sqrt(2 / module.in_features)
                assert module.weight.std().item() == pytest.approx(expected, rel=0.05), path


def test_tokens_of_the_ladder_come_in_with_unit_variance_and_others_as_the_scheme_says():
    baseline, llama = (MODELS[name](MODELS[name].Config()) for name in ("baseline", "llama"))
    positions = torch.arange(33)
    tokens = torch.randint(10_000, (4, 33))
    embedded = baseline.embed(tokens, positions) - sinusoidal(positions, baseline.config.d_model)
    assert embedded.std().item() == pytest.approx(1.0, rel=0.05)
    assert llama.tok_embed.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for tied, std in ((True, llama.config.d_model**-0.5), (False, 1.0)):
        config = MODELS["llama"].Config(initialization="truncated_normal", tie_embeddings=tied)
        assert MODELS["llama"](config).tok_embed.weight.std().item() == pytest.approx(std, rel=0.05)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_fresh_model_predicts_about_evenly_and_zero_outputs_make_blocks_the_identity(scheme):
    Model = MODELS["baseline"]
    torch.manual_seed(0)
    # a tied head knows the token it has just read before it has learned anything, so only its own is even
    model = Model(Model.Config(**Model.Config.small, vocab_size=97, initialization=scheme, tie_embeddings=False))
    tokens = torch.randint(97, (4, 33))
    x = model.embed(tokens, torch.arange(33))
    assert torch.equal(model.hidden(tokens), x) == (scheme == "zero_output")
    assert model.loss(tokens)[1]["ce"].item() == pytest.approx(torch.tensor(97.0).log().item(), abs=0.3)


SMALL = ["--n-layers", "3", "--d-model", "32", "--windows", "2", "--window-size", "16"]


def test_the_profile_holds_the_scales_of_the_stream_and_of_its_gradient():
    Model = MODELS["baseline"]
    torch.manual_seed(0)
    model = Model(Model.Config(**{**Model.Config.small, "vocab_size": 97, "n_layers": 3}, initialization="kaiming"))
    tokens = torch.randint(97, (2, 17))
    profile = plot_initialization.profile(model, tokens)

    positions = torch.arange(16)
    stream = [model.embed(tokens[:, :-1], positions)]
    for block in model.blocks:
        stream.append(block(stream[-1], positions))
    gradients = torch.autograd.grad(
        nn.functional.cross_entropy(model.unembed(stream[-1]).flatten(0, 1), tokens[:, 1:].flatten()), stream
    )
    assert profile.activations == pytest.approx([x.square().mean().sqrt().item() for x in stream], rel=1e-5)
    assert profile.gradients == pytest.approx([g.square().mean().sqrt().item() for g in gradients], rel=1e-4)


def test_the_script_draws_every_scheme_and_prints_a_row_for_each(tmp_path, capsys):
    picture = tmp_path / "deeper" / "initialization.png"
    profiles = plot_initialization.main([*SMALL, "--out", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row.split()[1] for row in rows[2:]] == list(SCHEMES)
    assert len({row.count("|") for row in rows}) == 1
    for scheme, profile in profiles.items():
        assert len(profile.activations) == len(profile.gradients) == 4
        flat = len({f"{x:.6g}" for x in profile.activations}) == 1
        assert flat == (scheme == "zero_output")


def test_the_script_takes_the_first_windows_of_real_data_and_says_where_they_are_too_few(tmp_path, monkeypatch):
    data = SimpleNamespace(train=np.arange(40, dtype=np.uint16), vocab_size=50)
    monkeypatch.setattr(plot_initialization, "open_tokens", lambda folder: data)
    arguments = plot_initialization.Arguments(windows=2, window_size=16, data=tmp_path)
    tokens, vocab_size = plot_initialization.read_tokens(arguments)
    assert vocab_size == 50
    assert torch.equal(tokens, torch.arange(34).view(2, 17))
    with pytest.raises(ValueError, match=r"40 tokens.*3 x 17.*--windows"):
        plot_initialization.main([*SMALL, "--windows", "3", "--data", str(tmp_path)])
