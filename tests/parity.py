"""What the tests of case studies share: a tiny model of transformers, every number re-drawn, and its twin of ours."""

import copy
import json
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import redraw

from llm.models.transformer import Transformer
from llm.pretrained import export_pretrained, load_pretrained

os.environ["HF_HUB_OFFLINE"] = "1"
VOCABULARY = 97
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}
LARGEST: dict[str, float] = {}
"""The largest difference of a logit so far, for each model_type: `pytest --parity` prints it."""


def original(architecture: str, seed: int = 0, **config):
    """A model of transformers in fp32, parameters and routing biases re-drawn; `config` goes on top of SIZES."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(seed)
    Model = getattr(transformers, architecture)
    names = {**SIZES, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None, **config}
    model = Model(Model.config_class(**names, **EAGER)).float().eval()
    redraw(model)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.3)
    return model


def twins(folder: Path, architecture: str, **config) -> tuple:
    """(theirs, ours): `original`, and what `load_pretrained` makes of what it saves."""
    theirs = original(architecture, **config)
    theirs.save_pretrained(folder / "theirs")
    return theirs, load_pretrained(folder / "theirs")


def rewrite(folder: Path, without: tuple[str, ...] = (), **fields) -> None:
    """Change the config.json of a checkpoint."""
    file = folder / "config.json"
    config = {**json.loads(file.read_text(encoding="utf-8")), **fields}
    file.write_text(json.dumps({name: config[name] for name in config.keys() - set(without)}), encoding="utf-8")


def draw_tokens(n_tokens: int, rows: int = 2, seed: int = 1) -> torch.Tensor:
    return torch.randint(VOCABULARY, (rows, n_tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(theirs, tokens: torch.Tensor) -> torch.Tensor:
    return theirs(tokens, use_cache=False).logits


@torch.no_grad()
def assert_same_logits(theirs, ours: Transformer, n_tokens: int = 40, atol: float = 2e-5) -> None:
    """Within `atol` in fp32, and not because they are all alike."""
    tokens = draw_tokens(n_tokens)
    expected = logits(theirs, tokens)
    assert expected.std() > 0.1
    found, kind = ours(tokens).to(expected.dtype), theirs.config.model_type  # some of theirs end in fp32
    LARGEST[kind] = max(LARGEST.get(kind, 0.0), (found - expected).abs().max().item())
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@torch.no_grad()
def assert_same_logits_padded(
    theirs, ours: Transformer, padding: tuple[int, ...] = (0, 5, 11), atol: float = 2e-5
) -> None:
    """A batch of texts of different lengths, padded on the left: ours through the cache, theirs with a mask."""
    tokens = draw_tokens(24, rows=len(padding))
    seen = torch.arange(24) >= torch.tensor(padding)[:, None]
    expected = theirs(tokens, attention_mask=seen.long(), use_cache=False).logits
    cache = ours.make_cache(len(tokens), 24, torch.tensor(padding))
    found = torch.cat([ours(part, cache) for part in tokens.split([13, 1, 1, 9], 1)], 1)
    torch.testing.assert_close(found[seen], expected[seen], rtol=0, atol=atol)


@torch.no_grad()
def assert_as_precise_in_bf16(folder: Path, theirs, n_tokens: int = 40) -> None:
    """A checkpoint in bf16 is loaded in bf16, and rounding moves its logits from those of fp32 as little as theirs:
    by a few of bf16's steps of 0.4 %."""
    transformers = pytest.importorskip("transformers")
    theirs.bfloat16().save_pretrained(folder / "bf16")
    ours, tokens = load_pretrained(folder / "bf16"), draw_tokens(n_tokens)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.bfloat16}
    open_theirs = partial(transformers.AutoModelForCausalLM.from_pretrained, folder / "bf16", **EAGER)
    exact, rounded = (logits(open_theirs(dtype=dtype).eval(), tokens) for dtype in (torch.float32, torch.bfloat16))
    assert (ours(tokens) - exact).norm() < 1.1 * (rounded - exact).norm() < 0.05 * exact.norm()


@torch.no_grad()
def assert_same_continuation(theirs, ours: Transformer, n_prompt: int = 9, n_new: int = 30) -> None:
    """Greedy: ours through the cache, theirs by computing all anew for each token."""
    prompt = draw_tokens(n_prompt)
    text = prompt
    for _ in range(n_new):
        text = torch.cat([text, logits(theirs, text)[:, -1:].argmax(-1)], 1)
    generated = torch.stack(list(ours.generate(prompt, n_new, lambda scores: scores.argmax(-1))), 1)
    assert torch.equal(generated, text[:, n_prompt:])


def assert_same_gradients(theirs, ours: Transformer, folder: Path, n_tokens: int = 24) -> None:
    """Of the mean cross-entropy, within 1e-4 of each parameter's norm. Their gradients come to us as weights do.

    Both are held to ours in float64: a gradient that is small against what cancels in it, as that of a decay, has
    rounding of its own on either side.
    """
    windows = draw_tokens(n_tokens + 1)
    exact = copy.deepcopy(ours).double().eval()
    for model in (ours.eval(), exact):
        model.loss(windows)[0].backward()
    scores = theirs(windows[:, :-1], use_cache=False).logits
    torch.nn.functional.cross_entropy(scores.flatten(0, 1), windows[:, 1:].flatten()).backward()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(parameter.grad)
    theirs.save_pretrained(folder / "gradients")
    expected = dict(load_pretrained(folder / "gradients").named_parameters())
    for (name, parameter), right in zip(ours.named_parameters(), exact.parameters(), strict=True):
        for gradient in (parameter.grad, expected[name]):
            difference = (gradient - right.grad).norm() / right.grad.norm()
            assert difference < 1e-4, f"{name}: {difference:.1e}"


def assert_survives_export(theirs, ours: Transformer, folder: Path, n_tokens: int = 40) -> None:
    """What transformers opens again has the same class and the very same logits."""
    transformers = pytest.importorskip("transformers")
    export_pretrained(ours, folder / "exported")
    again = transformers.AutoModelForCausalLM.from_pretrained(folder / "exported", **EAGER)
    assert type(again) is type(theirs)
    tokens = draw_tokens(n_tokens)
    assert torch.equal(logits(again.eval(), tokens), logits(theirs, tokens))
    assert load_pretrained(folder / "exported").config == ours.config


def assert_parity(folder: Path, architecture: str, n_tokens: int = 40, atol: float = 2e-5, **config) -> tuple:
    """All four promises of a case study; returns (theirs, ours), the former with its gradients in place of weights."""
    theirs, ours = twins(folder, architecture, **config)
    assert_same_logits(theirs, ours, n_tokens, atol)
    assert_same_continuation(theirs, ours)
    assert_survives_export(theirs, ours, folder, n_tokens)
    assert_same_gradients(theirs, ours, folder)
    return theirs, ours
