"""Write token arrays and three finished runs with the code of commit aea6ab2: see README.md."""

import sys
from pathlib import Path

sys.path.insert(0, ".")
from llm.config import TrainConfig
from llm.data import open_tokens
from llm.models import MODELS
from llm.sample_stories import sample_stories
from llm.tokenization import pre_tokenize
from llm.train import train

SIZES = {
    "baseline": dict(n_heads=2, d_ff=16),
    "loss_free_balancing": dict(n_heads=2, d_expert=8, n_experts=4),
    "deepseek_v3": dict(
        **dict(n_layers=2, n_heads=2, kv_lora_rank=8, q_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4),
        **dict(v_head_dim=4, d_ff=16, d_expert=8, n_experts=4, n_groups=2),
    ),
}
STEPS = dict(steps=4, tokens_per_step=64, micro_batch_size=2, warmup_steps=1, eval_every=2, eval_windows=4)
STEPS |= dict(save_every=2, log_every=1, device="cpu", precision="fp32", compile="off")

out = Path(sys.argv[1])
for split, n_stories in (("train", 12), ("eval", 4)):
    (out / f"{split}.txt").write_text("\n<|endoftext|>\n".join(sample_stories()[split][:n_stories]))
pre_tokenize(out / "train.txt", out / "eval.txt", out / "data", 300)
data = open_tokens(out / "data")
for name, sizes in SIZES.items():
    Model, Config = MODELS[name]
    config = Config(**{"vocab_size": data.vocab_size, "n_layers": 1, "max_seq_len": 16, "d_model": 8} | sizes)
    train(Model, config, TrainConfig(data=out / "data", out=out / name, **STEPS), data)
