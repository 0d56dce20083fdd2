"""Ctrl-C, SIGTERM and the loss of the terminal (SIGHUP) ask a run to stop after its current step."""

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass
class StopRequest:
    """The signal that asked the run to stop; 0 while none has."""

    signal: int = 0


@contextlib.contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Within this block, Ctrl-C, SIGTERM and SIGHUP are noted; a second Ctrl-C ends the process at once. SIGHUP
    stays ignored under `nohup`, which has it ignored."""
    stop = StopRequest()

    def note(number: int, frame: object) -> None:
        if stop.signal and number == signal.SIGINT:
            os._exit(128 + number)
        stop.signal = number

    before = {}
    for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", None)):  # Windows has no SIGHUP
        if number is not None and (number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN):
            before[number] = signal.signal(number, note)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
