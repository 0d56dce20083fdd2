"""A copy of the metrics on Weights & Biases that can neither stop nor delay a run.

wandb is used, and even imported, only in a background thread that reads lines from a queue. The run puts lines into the
queue and waits a few seconds at its end, no more. Any error of wandb ends the copying, and one line says so.
"""

import os
import queue
import secrets
import threading
from pathlib import Path
from typing import Literal

FINISH_SECONDS = 8.0
LARGEST_BACKLOG = 10_000
SETTINGS = {
    "silent": True,
    "console": "off",
    "disable_git": True,
    "save_code": False,
    "init_timeout": 6.0,
    "finish_timeout": 5.0,
    "login_timeout": 1.0,
}


class WandbMirror:
    """Copies `log` calls into one wandb run. Its id is kept in the run directory, so a resumed run goes on in it.

    Args:
        mode: "auto" means online where WANDB_API_KEY is set, else off.
        folder: the run directory; wandb's own files go to `folder/wandb`.
        config: shown beside the curves.
        resumed: go on in the earlier wandb run.
    """

    def __init__(self, mode: Literal["auto", "online", "offline", "off"], folder: Path, config: dict, *, resumed: bool):
        if mode == "auto":
            mode = "online" if os.environ.get("WANDB_API_KEY") else "off"
        self._lines: queue.SimpleQueue[tuple[int, dict] | None] = queue.SimpleQueue()
        self._exit_code = 0
        self._left_behind = False
        # a daemon thread, so that one that hangs in wandb does not keep the process alive
        self._worker = threading.Thread(target=self._work, args=(mode, folder, config, resumed), daemon=True)
        if mode != "off":
            self._worker.start()

    def log(self, step: int, values: dict) -> None:
        """Queue a line and return at once. Lines are dropped while the queue is full."""
        if self._worker.is_alive() and self._lines.qsize() < LARGEST_BACKLOG:
            self._lines.put((step, values))

    def finish(self, exit_code: int) -> None:
        """End the wandb run; wait FINISH_SECONDS at most."""
        if not self._worker.is_alive():
            return
        self._exit_code = exit_code
        self._lines.put(None)
        self._worker.join(FINISH_SECONDS)
        if self._worker.is_alive():
            self._left_behind = True
            print(f"wandb mirror left behind: not finished after {FINISH_SECONDS:g} s; metrics.jsonl is complete")

    def _work(self, mode: str, folder: Path, config: dict, resumed: bool) -> None:
        try:
            os.environ["WANDB_SILENT"] = "true"  # also suppresses its prompt for a key
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # sends no crash reports
            import wandb

            run = wandb.init(
                project="llm-architecture",
                name=folder.name,
                id=_run_id(folder, resumed),
                resume="allow" if resumed else None,
                mode=mode,
                dir=folder,
                config=config,
                settings=wandb.Settings(**SETTINGS),
            )
            while (line := self._lines.get()) is not None:
                step, values = line
                run.log(values, step=step)
            run.finish(exit_code=self._exit_code)
        except BaseException as error:  # wandb also raises SystemExit
            if self._left_behind:
                return
            reason = str(error).strip().splitlines() or [type(error).__name__]
            print(f"wandb mirror off: {reason[0]}; the run goes on, metrics.jsonl is the record")


def _run_id(folder: Path, resumed: bool) -> str:
    file = folder / "wandb-run-id.txt"
    if not (resumed and file.exists()):
        file.write_text(secrets.token_hex(4), encoding="utf-8")
    return file.read_text(encoding="utf-8").strip()
