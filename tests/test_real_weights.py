"""Models that others trained give here what others published: text, loss and logits."""

import hashlib
import itertools

import pytest
import torch
from real_weights import published_partials, real_file, write_gpt_nano, write_stories260k

from llm.evaluate import main as evaluate
from llm.generate.sampling import greedy
from llm.hub.folder import load_hub_tokenizer
from llm.pretrained import load_pretrained


@pytest.fixture
def stories260k(tmp_path):
    return write_stories260k(tmp_path)


def test_stories260k_writes_the_text_that_llama2c_publishes(stories260k):
    model, tokenizer = load_pretrained(stories260k), load_hub_tokenizer(stories260k)
    assert sum(parameter.numel() for parameter in model.parameters()) == 260_032
    ids = [int(token) for token in model.generate(torch.tensor([[1]]), 200, greedy)]
    text = tokenizer.decode(ids).encode()
    assert text.startswith(b"Once upon a time, there was a little girl named Lily. She loved to play outside in the")
    assert len(text) == 464
    digest = hashlib.sha256(text).hexdigest()
    assert digest.startswith("beeb5cb4") and digest.endswith("981d14")


def test_stories260k_has_its_loss_on_the_validation_text(stories260k, capsys):
    """Through the command that users call."""
    evaluate([str(stories260k), "--text", str(real_file("TinyStoriesV2-GPT4-valid.txt")), "--device", "cpu"])
    said = capsys.readouterr()
    assert said.out.startswith("261,120 tokens, ") and "evaluating" in said.err
    assert "1.35438" in said.out and said.out.endswith("0.9522 bits per byte\n")


@torch.inference_mode()
def test_gpt_nano_has_its_published_logits_and_sorts_every_input(tmp_path):
    model, published = load_pretrained(write_gpt_nano(tmp_path)), published_partials()
    logits = model(published["idx"].long())
    torch.testing.assert_close(logits, published["lm_head"], rtol=0, atol=2e-5)
    inputs = torch.tensor(list(itertools.product(range(3), repeat=6)))
    answers = torch.stack(list(model.generate(inputs, 6, greedy)), 1)
    assert torch.equal(answers[:, :6], inputs.sort().values)
