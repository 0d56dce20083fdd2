"""What the first rank shows while a run trains, and writes into its run directory."""

import math
import os
import shlex
import sys
import time
from typing import TYPE_CHECKING

from tqdm import tqdm

from llm.accounting import describe, summary
from llm.checkpoint import save_checkpoint
from llm.generate import begin, write
from llm.run_directory import RunDirectory, read_metrics
from llm.tokenization import load_tokenizer

if TYPE_CHECKING:
    from llm.train import Training

PROMPT = "Once upon a time"


class Journal:
    """Progress bar, metrics, sample stories, curve and checkpoints of one run."""

    def __init__(self, training: "Training"):
        self.training, self.model, self.config = training, training.model, training.config
        self.machine = training.machine
        self.tokenizer = load_tokenizer(training.data.tokenizer_path)
        costs = describe(self.model, self.model.config.max_seq_len)
        self.record = training.record | {
            "device": self.machine.name,
            "precision": self.machine.precision,
            "compiled": self.machine.compile,
            "world_size": training.ranks.world_size,
            "costs": costs,
        }
        step = training.progress.step
        self.run = RunDirectory(self.config.out, self.record, wandb=self.config.wandb, resume_step=step)
        self.flops_per_token = costs["training_flops_per_token"]
        self.story = ""
        self.introduce()
        self.bar = tqdm(
            total=self.config.steps,
            initial=step,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 10,
        )
        self.restart_clock()

    def introduce(self) -> None:
        """Print what is about to be trained, on what, and where it goes."""
        c, data = self.config, self.training.data
        n_tokens = len(data.train)
        budget = c.steps * c.tokens_per_step
        print(summary(self.model))
        print(f"data        {data.folder}: {n_tokens:,} tokens, vocabulary {data.vocab_size:,}")
        print(f"budget      {c.steps:,} steps x {c.tokens_per_step:,} tokens = {budget / n_tokens:.1f} epochs")
        print(
            f"machine     {self.machine.name}, {self.machine.precision}{', compiled' if self.machine.compile else ''}"
        )
        done = self.training.progress.step
        same = {"cpu": "bitwise, with as many CPU threads", "cuda": "nearly, not bitwise"}
        print(f"repeatable  {same.get(self.machine.device.type, 'not promised')}")
        print(f"run         {c.out}{f', going on after step {done}' if done else ''}", flush=True)

    def restart_clock(self) -> None:
        """Measure speed from here: evaluations and checkpoints do not count."""
        self.clock, self.clock_steps = time.perf_counter(), 0

    def tick(self, report: dict[str, float], lr: float) -> None:
        """A step is done: move the bar, and on a logged step write a line."""
        step = self.training.progress.step
        self.clock_steps += 1
        rate = self.clock_steps * self.config.tokens_per_step / (time.perf_counter() - self.clock)
        shown = {"loss": f"{report['ce']:.3f}", "tokens/s": f"{rate:,.0f}"}
        if self.machine.peak_flops:
            shown["of peak"] = f"{self.share_of_peak(rate):.0%}"
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()
        if step % self.config.log_every == 0 or step == self.config.steps:
            values = {"loss": report["ce"], **{k: v for k, v in report.items() if k not in ("ce", "stop")}}
            tokens = step * self.config.tokens_per_step
            self.run.log(step, tokens=tokens, lr=lr, tokens_per_second=rate, **values, **self.model.metrics())

    def share_of_peak(self, tokens_per_second: float) -> float:
        """Model FLOP/s of all ranks over what their devices can do at most."""
        return tokens_per_second * self.flops_per_token / (self.machine.peak_flops * self.training.ranks.world_size)

    def evaluated(self, result: dict[str, float]) -> None:
        """Write down an evaluation, a greedy story and the curve."""
        step = self.training.progress.step
        tokens = step * self.config.tokens_per_step
        self.run.log(step, tokens=tokens, peak_memory_bytes=self.machine.peak_memory(), **result)
        prompt = PROMPT if len(begin(self.tokenizer, PROMPT)) < self.model.config.max_seq_len else ""
        self.story = write(self.model.eval(), self.tokenizer, [prompt], 200)[0]
        self.model.train()
        self.run.sample(step, self.story)
        self.run.plot()
        tqdm.write(
            f"step {step}: eval loss {result['eval_loss']:.4f}, {result['eval_bits_per_byte']:.4f} bits per byte"
        )
        self.restart_clock()

    def save(self, best: bool) -> None:
        """Write a checkpoint of this step; `best`: no earlier eval loss was lower."""
        progress = self.training.progress
        save_checkpoint(
            self.run.checkpoints,
            step=progress.step,
            model=self.model,
            optimizer_state=self.training.optimizer.state_dict(),
            state={"best_eval_loss": progress.best_eval_loss},
            config=self.record,
            tokenizer=self.training.data.tokenizer_path,
            keep_best=best,
        )
        self.restart_clock()

    def conclude(self) -> None:
        """Say what came of it, where it lies and what to try next."""
        self.bar.close()
        out = self.config.out
        evaluations = [line for line in read_metrics(out / "metrics.jsonl") if "eval_loss" in line]
        first, last = (
            {name: math.nan if value is None else value for name, value in line.items()}  # null: it was not finite
            for line in (evaluations[0], evaluations[-1])
        )
        print(
            f"\neval loss   {first['eval_loss']:.3f} at step {first['step']}, {last['eval_loss']:.3f} at step "
            f"{last['step']} ({last['eval_bits_per_byte']:.3f} bits per byte)\n"
            f"a story     {self.story}\n\n"
            f"metrics     {out / 'metrics.jsonl'}\n"
            f"curve       {out / 'loss.png'}\n"
            f"checkpoints {out / 'checkpoints'}\n"
            f'try next    {python()} -m llm.generate {shlex.quote(str(out))} --prompt "{PROMPT}"'
        )

    def close(self, exit_code: int) -> None:
        """Let go of the run directory and of wandb."""
        self.bar.close()
        self.run.close(exit_code)


def python() -> str:
    """How this process was started: `uv run`, which tells its children so, finds packages that plain python may not."""
    return "uv run python" if "UV_RUN_RECURSION_DEPTH" in os.environ else "python"
