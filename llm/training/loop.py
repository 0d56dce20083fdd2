"""The training loop, which is the same for every model.

Each step reads its windows, computes the gradient of the mean loss in micro-batches, clips it and updates the weights.
Data and random numbers depend only on seed and step, so a run that was stopped and resumed computes the same steps.
"""

import math
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from llm.config import ModelConfig, TrainConfig
from llm.data.files import Data
from llm.data.windows import step_batches
from llm.models.transformer import Transformer
from llm.training.checkpoint import find_checkpoints
from llm.training.device import find_machine, keep_freed_memory
from llm.training.distributed import Ranks
from llm.training.evaluate import EvalSet, evaluate
from llm.training.gradient import compute_gradient, make_objective, share_out, with_noise
from llm.training.journal import Journal
from llm.training.optim import learning_rate, make_optimizer
from llm.training.resume import find_checkpoint, go_on_from, run_record
from llm.training.sharding import check_shard, gathered, place, whole
from llm.training.stopping import StopRequest, stop_signals
from llm.training.story import write_story


def train(Model: type[Transformer], model_config: ModelConfig, config: TrainConfig, data: Data) -> Path:
    """Train `Model` on `data`; returns the run directory, which holds metrics, checkpoints and samples.

    Raises ValueError for invalid settings before training starts, FloatingPointError if the loss or the gradient norm
    is not finite, and SystemExit(128 + signal number) if a signal stopped the run before its last step.
    """
    training = Training(Model, model_config, config, data)
    if training.progress.step < training.config.steps:
        with stop_signals() as stop:
            training.run(stop)
    elif training.ranks.is_first:
        print(
            f"already finished: step {training.progress.step} of {training.config.steps} (to train longer: --resume "
            f"PATH with more --steps and another --out; to start anew: --resume never)"
        )
    return training.config.out


def default_out(model_name: str, data: Path) -> Path:
    """The default run directory, such as runs/baseline for TinyStories or runs/baseline-sample for data/sample."""
    return Path("runs") / (model_name if data.name == "tinystories" else f"{model_name}-{data.name}")


class Training:
    """A model, its optimiser and its data, at the step where the run starts or resumes."""

    def __init__(self, Model: type[Transformer], model_config: ModelConfig, config: TrainConfig, data: Data):
        check_shard(config)
        self.data, self.ranks = data, Ranks.current()
        self.machine = find_machine(config, self.ranks.local_rank)
        keep_freed_memory(self.machine.device)
        self.windows, self.micro_batch_size = share_out(config, model_config.max_seq_len, self.ranks.world_size)
        self.record = run_record(Model, model_config, config, data)
        out = config.out or default_out(self.record["model_name"], data.folder)
        checkpoint = find_checkpoint(config.resume, out, self.record)
        self.config = replace(config, out=out)
        self.record["train"] |= {"out": str(out), "micro_batch_size": self.micro_batch_size}
        self.eval_set = EvalSet.of(data, model_config.max_seq_len, config.eval_windows)
        torch.manual_seed(config.seed)
        model = Model(model_config)
        if config.shard and not all(p.requires_grad for p in model.parameters()):
            raise ValueError(
                "shard = True cannot train a model with frozen weights: its blocks return nothing that has a gradient, "
                "and so torch does not gather their weights for the backward pass. Leave out --shard in this stage"
            )
        self.model = place(model, config, self.machine, self.ranks)
        self.optimizer = make_optimizer(self.model, config)
        self.progress = go_on_from(checkpoint, self.model, self.optimizer, self.config, self.ranks)

    def run(self, stop: StopRequest) -> None:
        """Train to the last step, or until a signal asks the run to stop."""
        config, progress, first = self.config, self.progress, self.ranks.is_first
        self.objective = make_objective(self.model, config, self.machine, self.ranks)
        self.journal = self.make_journal() if first else None
        exit_code = 1
        try:
            if progress.step == 0:
                self.evaluate()
            for micro_batches in self.batches():
                report, lr = self.update(micro_batches, stop)
                if first:
                    self.journal.tick(report, lr)
                last, stopping = progress.step == config.steps, report["stop"] > 0
                best = (last or progress.step % config.eval_every == 0) and self.evaluate()
                if best or last or stopping or progress.step % config.save_every == 0:
                    self.save(best)
                if stopping and not last:
                    raise SystemExit(self.explain_stop(stop))
            if first:
                self.journal.conclude()
            exit_code = 0
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(
                f"out of memory, with {(self.machine.peak_memory() or 0) / 2**30:.1f} GiB in use at most: lower "
                f"--micro-batch-size (now {self.micro_batch_size} windows; the result stays the same) or give "
                f"--recompute. {error}"
            ) from error
        finally:
            if first:
                self.journal.close(exit_code)

    def make_journal(self) -> Journal:
        """The journal of this run, which prints and writes its results; only the first rank has one."""
        return Journal(
            model=self.model,
            progress=self.progress,
            config=self.config,
            record=self.record,
            data=self.data,
            machine=self.machine,
            world_size=self.ranks.world_size,
        )

    def batches(self) -> Iterator[list[tuple[int, Tensor]]]:
        """The micro-batches of this rank, one list for each remaining step."""
        return step_batches(
            self.data.train,
            seq_len=self.model.config.max_seq_len,
            micro_batch_size=self.micro_batch_size,
            windows_per_step=self.windows,
            seed=self.config.seed,
            first_step=self.progress.step,
            last_step=self.config.steps,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            to_device=self.machine.to_device,
        )

    def update(self, micro_batches: list[tuple[int, Tensor]], stop: StopRequest) -> tuple[dict[str, float], float]:
        """One optimiser step. Returns a report and the learning rate. The report has the loss parts, the gradient norm
        and whether to stop, averaged over ranks. They are read together, since each read waits for the device."""
        step = self.progress.step + 1
        lr = learning_rate(step, self.config)
        place = self.config.seed, step
        inputs = with_noise(self.model, micro_batches, self.windows, place)
        parts = compute_gradient(self.objective, inputs, place, self.machine)
        norm = whole(nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip))
        values = torch.stack([norm, norm.new_tensor(float(stop.signal != 0)), *parts.values()])
        report = dict(zip(["grad_norm", "stop", *parts], self.ranks.average(values).tolist(), strict=True))
        if not all(map(math.isfinite, report.values())):
            raise FloatingPointError(
                f"step {step}: loss {report['ce']}, gradient norm {report['grad_norm']} at learning rate {lr:.3g}; the "
                f"weights were not updated. Last good step: {self.last_saved()}. Try --precision fp32, or begin anew "
                f"(--resume never) with a lower --max-lr or a longer --warmup-steps"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.model.after_step()
        self.progress.step = step
        return report, lr

    def evaluate(self) -> bool:
        """Evaluate on every rank and log the result. Returns whether the eval loss is the lowest so far."""
        result = evaluate(
            self.model, self.eval_set, self.micro_batch_size, self.machine, self.ranks, seed=self.config.seed
        )
        best = result["eval_loss"] < self.progress.best_eval_loss
        if best:
            self.progress.best_eval_loss = result["eval_loss"]
        story = None
        if self.config.illustrate and (self.ranks.is_first or self.config.shard):
            story = write_story(self.model, self.data, self.ranks, self.config.shard)
        if self.ranks.is_first:
            self.journal.evaluated(result, story)
        return best

    def save(self, best: bool) -> None:
        """Write a checkpoint on the first rank, to which the others give their parts of a sharded model."""
        weights, state = (gathered(part.state_dict(), self.ranks) for part in (self.model, self.optimizer))
        if self.ranks.is_first:
            self.journal.save(weights, state, best)

    def last_saved(self) -> str:
        """The path of the newest checkpoint, as text for messages."""
        saved = find_checkpoints(self.config.out / "checkpoints")
        return str(saved[-1]) if saved else "none was saved"

    def explain_stop(self, stop: StopRequest) -> int:
        """Print where the run is saved and how to resume it. Returns the exit status."""
        if self.ranks.is_first:
            but = "" if self.config.resume == "auto" else " with --resume auto"
            tqdm.write(
                f"stopped after step {self.progress.step} of {self.config.steps}, saved in {self.last_saved()}\n"
                f"to go on, give the same command again{but}"
            )
        return 128 + (stop.signal or signal.SIGTERM)
