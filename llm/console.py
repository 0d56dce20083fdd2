"""What is printed never decides how a command ends.

A terminal may not know a character (cp1252, ascii), and it may be gone: a pipe is closed, a window is shut. Within
`console()`, a character that cannot be written is replaced by `?`, and what can no longer be written is dropped.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class Console:
    """A text stream whose `write` and `flush` never raise; all else is that of `stream`."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            self.stream.write(text)
        except UnicodeEncodeError:
            encoding = self.stream.encoding or "ascii"
            return self.write(text.encode(encoding, "replace").decode(encoding))
        except (OSError, ValueError):  # ValueError: it was closed
            self.give_up()
        return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except (OSError, ValueError):
            self.give_up()

    def give_up(self) -> None:
        """Let the stream lead nowhere, so that Python does not fail either when it writes the rest at its end."""
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), self.stream.fileno())


@contextlib.contextmanager
def console() -> Iterator[None]:
    """Within this block, printing never raises; a stream that the process was started without leads nowhere."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (Console(stream or open(os.devnull, "w")) for stream in before)  # noqa: SIM115
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before
