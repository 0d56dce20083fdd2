"""Models that others trained give here what others published: text, loss and logits."""

import hashlib
import itertools

import pytest
import torch
from real_weights import published_partials, real_file, write_gpt_nano, write_stories260k

from llm.data.stories import END_OF_TEXT
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


@torch.inference_mode()
def test_stories260k_has_its_loss_on_the_validation_text(stories260k):
    model, tokenizer = load_pretrained(stories260k), load_hub_tokenizer(stories260k)
    text = real_file("TinyStoriesV2-GPT4-valid.txt").read_text(encoding="utf-8")
    stories = [story.strip() for story in text.split(END_OF_TEXT) if story.strip()]
    ids = torch.tensor([token for story in tokenizer.encode_batch(stories) for token in story.ids])
    windows = ids[: 510 * 512 + 1].unfold(0, 513, 512)
    assert (len(ids) - 1) // 512 == len(windows) == 510
    losses = [model.loss(batch)[1]["ce"].item() for batch in windows.split(15)]
    assert sum(losses) / len(losses) == pytest.approx(1.354381, abs=1e-5)


@torch.inference_mode()
def test_gpt_nano_has_its_published_logits_and_sorts_every_input(tmp_path):
    model, published = load_pretrained(write_gpt_nano(tmp_path)), published_partials()
    logits = model(published["idx"].long())
    torch.testing.assert_close(logits, published["lm_head"], rtol=0, atol=2e-5)
    inputs = torch.tensor(list(itertools.product(range(3), repeat=6)))
    answers = torch.stack(list(model.generate(inputs, 6, greedy)), 1)
    assert torch.equal(answers[:, :6], inputs.sort().values)
