"""What the first rank prints while a run trains and writes into its run directory."""

import math
import os
import shlex
import sys
import time
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from llm.analysis.accounting import describe, summary
from llm.config import TrainConfig
from llm.data.files import Data
from llm.models.transformer import Transformer
from llm.modules.kernels.fla import kernel_report
from llm.training.checkpoint import save_checkpoint
from llm.training.device import Machine
from llm.training.evaluate import in_words, is_bound
from llm.training.resume import Progress
from llm.training.run_directory import RunDirectory, read_metrics
from llm.training.story import PROMPT


@dataclass(eq=False, kw_only=True)
class Journal:
    """Progress bar, metrics, sample stories, curve and checkpoints of one run. `record` becomes its config.json."""

    model: Transformer
    progress: Progress
    config: TrainConfig
    record: dict
    data: Data
    machine: Machine
    world_size: int

    def __post_init__(self):
        config, machine = self.config, self.machine
        costs = describe(self.model, self.model.config.max_seq_len)
        where = {"device": machine.name, "precision": machine.precision, "compiled": machine.compile}
        self.record = self.record | where | {"world_size": self.world_size, "costs": costs}
        self.run = RunDirectory(config.out, self.record, wandb=config.wandb, resume_step=self.progress.step)
        self.flops_per_token = costs["training_flops_per_token"]
        self.story = ""
        self.introduce()
        self.bar = tqdm(
            total=config.steps,
            initial=self.progress.step,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 10,
        )
        self.restart_clock()

    def introduce(self) -> None:
        """Print the model, the data, the budget, the machine and the run directory."""
        c, n_tokens, done = self.config, len(self.data.train), self.progress.step
        budget = c.steps * c.tokens_per_step
        print(summary(self.model))
        print(f"data        {self.data.folder}: {n_tokens:,} tokens, vocabulary {self.data.vocab_size:,}")
        print(f"budget      {c.steps:,} steps x {c.tokens_per_step:,} tokens = {budget / n_tokens:.1f} epochs")
        print(
            f"machine     {self.machine.name}, {self.machine.precision}{', compiled' if self.machine.compile else ''}"
        )
        dtype = torch.bfloat16 if self.machine.bf16 else torch.float32
        if kernels := kernel_report(self.model, self.machine.device, dtype):
            print(f"kernels     {kernels}")
        print(f"repeatable  {self.machine.repeatable}")
        print(f"run         {c.out}{f', going on after step {done}' if done else ''}", flush=True)

    def restart_clock(self) -> None:
        """Measure the speed of the steps from here, so that evaluations and checkpoints do not count."""
        self.clock, self.clock_steps = time.perf_counter(), 0

    def tick(self, report: dict[str, float], lr: float) -> None:
        """After each step: move the bar, and write a line of metrics where one is due."""
        step = self.progress.step
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
        """FLOP/s of the model on all ranks, divided by the peak of their devices."""
        return tokens_per_second * self.flops_per_token / (self.machine.peak_flops * self.world_size)

    def evaluated(self, result: dict[str, float], story: str | None) -> None:
        """After an evaluation: log it, and with a story write it down and draw the curve."""
        step = self.progress.step
        tokens = step * self.config.tokens_per_step
        self.run.log(step, tokens=tokens, peak_memory_bytes=self.machine.peak_memory(), **result)
        if story is not None:
            self.story = story
            self.run.sample(step, self.story)
            self.run.plot()
        tqdm.write(f"step {step}: {in_words(result)}")
        self.restart_clock()

    def save(self, weights: dict[str, Tensor], optimizer_state: dict, best: bool) -> None:
        """Write a checkpoint of this step; `best`: its eval loss is the lowest so far."""
        save_checkpoint(
            self.run.checkpoints,
            step=self.progress.step,
            weights=weights,
            optimizer_state=optimizer_state,
            state={"best_eval_loss": self.progress.best_eval_loss},
            config=self.record,
            tokenizer=self.data.tokenizer_path,
            keep_best=best,
        )
        self.restart_clock()

    def conclude(self) -> None:
        """Print the results, where they are and what to try next."""
        self.bar.close()
        out = self.config.out
        evaluations = [line for line in read_metrics(out / "metrics.jsonl") if "eval_loss" in line]
        first, last = (
            {name: math.nan if value is None else value for name, value in line.items()}  # null: it was not finite
            for line in (evaluations[0], evaluations[-1])
        )
        print(
            f"\neval loss   {first['eval_loss']:.3f} at step {first['step']}, {last['eval_loss']:.3f} at step "
            f"{last['step']} ({last['eval_bits_per_byte']:.3f} bits per byte{', a bound' if is_bound(last) else ''})\n"
            + (f"a story     {self.story}\n\n" if self.config.illustrate else "")
            + f"metrics     {out / 'metrics.jsonl'}\n"
            + (f"curve       {out / 'loss.png'}\n" if self.config.illustrate else "")
            + f"checkpoints {out / 'checkpoints'}\n"
            f'try next    {python()} -m llm.generate {shlex.quote(str(out))} --prompt "{PROMPT}"'
        )

    def close(self, exit_code: int) -> None:
        """Close the run directory and end the wandb run."""
        self.bar.close()
        self.run.close(exit_code)


def python() -> str:
    """The command that starts Python: `uv run python` where uv started this process, since plain python may lack the
    packages."""
    return "uv run python" if "UV_RUN_RECURSION_DEPTH" in os.environ else "python"
