"""Every model with its parameters on a GPU makes no tensor elsewhere: held without a GPU, by tensors without data."""

import pytest
import torch
from conftest import VOCABULARY
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llm.models import MODELS

GPU = torch.device("cuda", 0)
# Autograd counts the devices at its first use. After a fake GPU it would start a thread for it, and then no test in
# this process could fork and train.
torch.ones((), requires_grad=True).backward()


class Elsewhere(TorchDispatchMode):
    """Notes the operations that make a tensor which is not on the GPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.found += [f"{operation} on {x.device}" for x in made if x.device != GPU]
        return result


@pytest.fixture(autouse=True)
def answers_of_an_h100(monkeypatch):
    """Where there is no GPU: autocast would turn itself off, and a kernel is chosen by the card's capability."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


@pytest.fixture(params=MODELS)
def model(request):
    """A tiny model whose parameters and buffers are on cuda:0 and have no data."""
    Model = MODELS[request.param]
    sizes = {**Model.Config.small, "vocab_size": VOCABULARY, "n_layers": 2, "max_seq_len": 64}
    dtype = request.node.callspec.params.get("dtype", torch.float32)
    built = Model(Model.Config(**sizes))
    with FakeTensorMode():
        for module in built.modules():
            for name, x in module.named_parameters(recurse=False):
                setattr(module, name, torch.nn.Parameter(torch.empty(x.shape, dtype=dtype, device=GPU)))
            for name, x in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty(x.shape, dtype=x.dtype, device=GPU))
        yield built


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.zeros(rows, length, dtype=torch.int64, device=GPU)


@pytest.mark.parametrize("autocast", [False, True])
def test_the_loss_stays_on_the_gpu(model, autocast):
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast), Elsewhere() as elsewhere:
        loss, parts = model.train().loss(tokens(2, 25))
    assert not elsewhere.found
    assert {loss.device, *(part.device for part in parts.values())} == {GPU}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_a_prompt_and_a_step_of_decoding_stay_on_the_gpu(model, dtype):
    assert model.eval().tok_embed.weight.dtype == dtype
    with Elsewhere() as elsewhere:
        cache = model.make_cache(2, 40, padding=torch.zeros(2, dtype=torch.int64, device=GPU))
        logits = [model.next_logits(tokens(2, 24), cache), model.decode(tokens(2, 1), cache)]
    assert not elsewhere.found
    assert {x.device for x in logits} == {GPU}
    assert {x.device for layer in cache.layers for x in layer.values()} == {GPU}


def test_a_tensor_made_elsewhere_is_found():
    with FakeTensorMode(), Elsewhere() as elsewhere:
        torch.zeros(3, device=GPU) + 1
        torch.arange(3)
    assert elsewhere.found == ["aten.arange.default on cpu"]
