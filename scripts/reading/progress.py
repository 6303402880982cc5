"""How far a run is, on the error stream: pages, pages per second, and when it will end."""

import sys
import time
from typing import TextIO


class Progress:
    """Counts pages.

    Args:
        total: Pages of the run, those done before left out.
        stream: Where it is shown (the error stream): in a terminal in one line that is written anew, else in a line every
            `every` seconds.
    """

    def __init__(self, total: int, stream: TextIO | None = None, every: float = 10.0):
        self.total, self.stream, self.every = total, stream or sys.stderr, every
        self.pages = self.failed = 0
        self.started = self.shown = time.monotonic()
        self.is_terminal = self.stream.isatty()

    def add(self, pages: int, failed: int) -> None:
        """Count pages that are done, `failed` of them without an answer."""
        self.pages, self.failed = self.pages + pages, self.failed + failed
        now = time.monotonic()
        if self.is_terminal or now - self.shown >= self.every:
            self.shown = now
            print(self.line(now), end="\r" if self.is_terminal else "\n", file=self.stream, flush=True)

    def line(self, now: float) -> str:
        """Describe the state at `now`, in seconds of the monotonic clock."""
        rate = self.pages / max(now - self.started, 1e-9)
        left = (self.total - self.pages) / rate if rate else 0
        failed = f", {self.failed} failed" if self.failed else ""
        return f"{self.pages}/{self.total} pages{failed}, {rate:.2f} pages/s, {duration(left)} to go   "

    def close(self) -> None:
        """Say how it went."""
        seconds = time.monotonic() - self.started
        rate = f", {self.pages / seconds:.2f} pages/s" if self.pages and seconds else ""
        print(f"{self.pages} pages in {duration(seconds)}{rate}; {self.failed} failed.", file=self.stream)


def duration(seconds: float) -> str:
    """Return a time as 8s, 1:05 or 2:01:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}" if minutes else f"{rest}s"
