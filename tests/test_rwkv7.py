"""RWKV-7: the time mix is the paper's recurrence, and a trained model gives the logits that others published."""

import hashlib
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import redraw, tiny_model

from llm.models.rwkv7 import RWKV7
from llm.modules.norms import LayerNorm
from llm.modules.recurrent.rwkv7 import ChannelMix, TimeMix

TRAINED = "tiny-rwkv-7v0-834K-FP32.bin"
SHA256 = {
    TRAINED: "0dce48ebe81873c1cfd6383bb4f4b259ff123b228e0c7d264ed6b1a2d547dd86",
    "expected-logits-7v0-834K.bin": "1171f8ddfd45839ec402af55e4859155da5a0f356868a9a7f5e82d40d608d553",
}


def real_weights(name: str) -> bytes:
    """A file that others published: in $LLM_REAL_WEIGHTS, or in shared/weights beside the repository."""
    beside = [folder / "shared" / "weights" for folder in Path(__file__).resolve().parents]
    folders = [Path(os.environ["LLM_REAL_WEIGHTS"])] if "LLM_REAL_WEIGHTS" in os.environ else beside
    for folder in folders:
        if (folder / name).exists():
            data = (folder / name).read_bytes()
            assert hashlib.sha256(data).hexdigest() == SHA256[name], f"{name} is not the published file"
            return data
    pytest.skip(f"{name} is not here; put its folder into LLM_REAL_WEIGHTS")


def tensors_of(data: bytes) -> dict[str, torch.Tensor]:
    """rwkv.cpp's format: six numbers, then for each tensor its axes (fastest first), name and float32 values."""
    tensors, at = {}, 24
    while at < len(data):
        n_axes, length, kind = struct.unpack_from("<3I", data, at)
        axes = struct.unpack_from(f"<{n_axes}I", data, at + 12)
        name = data[at + 12 + 4 * n_axes :][:length].decode()
        at += 12 + 4 * n_axes + length
        assert kind == 0, "not float32"
        values = np.frombuffer(data, np.float32, int(np.prod(axes)), at)
        tensors[name] = torch.from_numpy(values.copy()).reshape(*reversed(axes))
        at += values.nbytes
    return tensors


NAMES = {  # RWKV-LM's names -> ours, inside a block
    "ln1": "mixer_norm",
    "ln2": "ffn_norm",
    "att.receptance": "mixer.r_proj",
    "att.key": "mixer.k_proj",
    "att.value": "mixer.v_proj",
    "att.output": "mixer.o_proj",
    "att.ln_x": "mixer.o_norm",
    "att.k_k": "mixer.k_k",
    "att.k_a": "mixer.k_a",
    "att.r_k": "mixer.bonus.r_k",
    "ffn.key": "ffn.up_proj",
    "ffn.value": "ffn.down_proj",
    "ffn.x_k": "ffn.shift.mu",
}
LOW_RANK = {"w": "decay_lora", "a": "a_lora", "v": "value_lora", "g": "gate_lora"}
PARTS = {"0": "b_proj.bias", "1": "a_proj.weight", "2": "b_proj.weight"}


def our_state(theirs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    ours = {}
    for name, tensor in theirs.items():
        name = {"emb.weight": "tok_embed.weight", "head.weight": "lm_head.weight"}.get(name, name)
        name = name.replace("blocks.0.ln0", "embedding_norm").replace("ln_out", "norm")
        for old, new in NAMES.items():
            name = name.replace(f".{old}", f".{new}") if f".{old}." in f"{name}." else name
        for letter, lora in LOW_RANK.items():
            for digit, part in PARTS.items():
                name = name.replace(f"att.{letter}{digit}", f"mixer.{lora}.{part}")
        if name.endswith("x_rwkvag"):
            name = name.replace("att.x_rwkvag", "mixer.shift.mu")
            tensor = tensor.flatten(1)  # the order is r, w, k, v, a, g, as ours
        ours[name] = tensor
    return ours


class Published(RWKV7):
    """Published models have a norm after the embedding, which they do not scale."""

    def make_block(self, layer):
        if layer == 0:
            self.embedding_norm = LayerNorm(self.config.d_model, self.config.norm_eps)
        return super().make_block(layer)

    def embed(self, tokens, positions):
        return self.embedding_norm(self.tok_embed(tokens))


@pytest.fixture(scope="module")
def trained():
    theirs = our_state(tensors_of(real_weights(TRAINED)))
    sizes = dict(vocab_size=256, d_model=64, n_layers=12, n_heads=1, d_ff=256, tie_embeddings=False)
    model = Published(Published.Config(**sizes, decay_rank=32, value_rank=32, gate_rank=32)).eval()
    model.load_state_dict({name: theirs[name].reshape(old.shape) for name, old in model.state_dict().items()})
    assert theirs.keys() == model.state_dict().keys()
    return model


@pytest.mark.parametrize("parts", [[3], [1, 1, 1], [2, 1]])
def test_the_trained_model_gives_the_published_logits(trained, parts):
    expected = torch.frombuffer(bytearray(real_weights("expected-logits-7v0-834K.bin")), dtype=torch.float32)
    tokens = torch.tensor([list(b'"in')])
    with torch.no_grad():
        cache = trained.make_cache(1, 3)
        cached = [trained(part, cache)[0, -1] for part in tokens.split(parts, 1)][-1]
        torch.testing.assert_close(trained(tokens)[0, -1], expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(cached, expected, rtol=0, atol=1e-4)


def test_the_time_mix_is_the_papers_recurrence():
    torch.manual_seed(0)
    layer = TimeMix(
        d_model=16, n_heads=2, ranks={"decay": 3, "a": 4, "value": 5, "gate": 6}, value_residual=True
    ).double()
    redraw(layer)
    x, v_first = torch.randn(1, 9, 16).double(), torch.randn(1, 9, 16).double()
    loras = (layer.decay_lora, layer.a_lora, layer.value_lora, layer.gate_lora)
    (w0, w1, w2), (a0, a1, a2), (v0, v1, v2), (_, g1, g2) = [
        (lora.b_proj.bias, lora.a_proj.weight, lora.b_proj.weight) for lora in loras
    ]
    before, state, outputs = torch.zeros(16).double(), torch.zeros(2, 8, 8).double(), []
    for token, first in zip(x[0], v_first[0], strict=True):
        xr, xw, xk, xv, xa, xg = (token + (before - token) * mu for mu in layer.shift.mu)
        r, k, v = layer.r_proj.weight @ xr, layer.k_proj.weight @ xk, layer.v_proj.weight @ xv
        v = v + (first - v) * torch.sigmoid(v0 + v2 @ (v1 @ xv))
        a, g = torch.sigmoid(a0 + a2 @ (a1 @ xa)), g2 @ torch.sigmoid(g1 @ xg)
        w = torch.exp(-(torch.tensor(-0.5).double().exp()) * torch.sigmoid(w0 + w2 @ torch.tanh(w1 @ xw)))
        kappa = (k * layer.k_k).view(2, 8)
        kappa = kappa / kappa.norm(dim=-1, keepdim=True)
        k = k * (1 + (a - 1) * layer.k_a)
        r, k, v, a, w = (part.view(2, 8) for part in (r, k, v, a, w))
        transition = torch.diag_embed(w) - torch.einsum("hi,hj->hij", kappa, kappa * a)  # the paper's S is (V, K)
        state = state @ transition + torch.einsum("hv,hk->hvk", v, k)
        o = torch.einsum("hvk,hk->hv", state, r)
        o = (o - o.mean(-1, keepdim=True)) / (o.var(-1, correction=0, keepdim=True) + 8e-5).sqrt()
        o = o.flatten() * layer.o_norm.weight + layer.o_norm.bias
        bonus = (r * k * layer.bonus.r_k).sum(-1, keepdim=True) * v
        outputs.append(layer.o_proj.weight @ ((o + bonus.flatten()) * g))
        before = token
    found, handed_on = layer(x, torch.arange(9), None, v_first)
    torch.testing.assert_close(found[0], torch.stack(outputs))
    assert handed_on is v_first


def test_the_channel_mix_sees_the_token_before_and_no_other():
    torch.manual_seed(0)
    layer, x = ChannelMix(8, 20).double(), torch.randn(1, 5, 8).double()
    redraw(layer)
    mixed = x[0, 3] + layer.shift.mu[0] * (x[0, 2] - x[0, 3])
    expected = layer.down_proj.weight @ torch.relu(layer.up_proj.weight @ mixed) ** 2
    torch.testing.assert_close(layer(x, torch.arange(5))[0, 3], expected)


def test_values_are_drawn_towards_those_of_the_first_layer():
    model, tokens = tiny_model("rwkv7"), torch.randint(97, (1, 6), generator=torch.Generator().manual_seed(1))
    before = model(tokens)
    model.blocks[1].mixer.value_lora.b_proj.bias.data.fill_(-1e4)  # no share of the first layer's values
    assert not torch.allclose(before, model(tokens))
    assert model.blocks[0].mixer.value_lora is None
