"""The story that a run writes at each evaluation: the likeliest tokens after "Once upon a time"."""

from torch import Tensor

from llm.data.files import Data, load_tokenizer
from llm.generate.sampling import greedy
from llm.generate.text import encode_prompt, write
from llm.models.transformer import Transformer
from llm.training.distributed import Ranks
from llm.training.sharding import whole_outside_blocks

PROMPT = "Once upon a time"


def write_story(model: Transformer, data: Data, ranks: Ranks, shard: bool) -> str:
    """A prompt and up to 200 tokens more. Where the ranks share out the weights (`shard`), all of them must call this.
    Each token is then the first rank's choice, so that the others end with it even where their logits round otherwise.
    """

    def sampler(logits: Tensor) -> Tensor:
        return ranks.as_first(greedy(logits)) if shard else greedy(logits)

    tokenizer = load_tokenizer(data.tokenizer_path)
    prompt = PROMPT if len(encode_prompt(tokenizer, PROMPT)) < model.config.max_seq_len else ""
    model.eval()
    with whole_outside_blocks(model):
        story = write(model, tokenizer, [prompt], 200, sampler)[0]
    model.train()
    return story
