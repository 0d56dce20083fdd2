"""Ctrl-C and SIGTERM ask a run to stop after its current step."""

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
    """Within this block, Ctrl-C and SIGTERM are noted; a second Ctrl-C ends the process at once."""
    stop = StopRequest()

    def note(number: int, frame: object) -> None:
        if stop.signal and number == signal.SIGINT:
            os._exit(128 + number)
        stop.signal = number

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
