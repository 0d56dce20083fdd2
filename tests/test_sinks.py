"""How much attention the first token gets (llm/analysis/sinks.py)."""

import pytest
import torch

from llm.analysis.sinks import first_token_weights
from llm.models import MODELS

TEXTS = torch.randint(50, (3, 12), generator=torch.Generator().manual_seed(0))


def small(name):
    torch.manual_seed(0)
    Model = MODELS[name]
    return Model(Model.Config(**{**Model.Config.small, "vocab_size": 50, "max_seq_len": 12})).eval()


@torch.no_grad()
@pytest.mark.parametrize(("name", "more"), [("baseline", 0), ("gated_attention", 0), ("attention_sink", 1)])
def test_without_a_preference_the_first_of_t_tokens_has_its_share(name, more):
    model = small(name)
    for block in model.blocks:
        block.mixer.q_proj.weight.zero_()
    expected = 1 / (torch.arange(1.0, 13) + more)  # a learned sink of 0 is one more key
    torch.testing.assert_close(
        first_token_weights(model, TEXTS), expected.expand(len(model.blocks), model.config.n_heads, 12)
    )


@torch.no_grad()
def test_it_is_the_weight_of_the_softmax():
    model = small("baseline")
    layer, found = model.blocks[0].mixer, first_token_weights(model, TEXTS)[0]
    inputs = model.blocks[0].mixer_norm(model.embed(TEXTS, torch.arange(12)))
    q, k, _ = (x.transpose(1, 2) for x in layer.project(inputs, torch.arange(12)))
    for t in range(12):
        scores = q[:, :, t, None] @ k[:, :, : t + 1].transpose(2, 3) / layer.head_dim**0.5
        torch.testing.assert_close(found[:, t], scores.softmax(-1)[:, :, 0, 0].mean(0))


def test_a_model_of_states_has_no_such_weights():
    with pytest.raises(ValueError, match=r"Hybrid mixes tokens with GatedDeltaNet: name a model of attention only"):
        first_token_weights(small("hybrid"), TEXTS)
