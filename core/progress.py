"""How far the run is: a live line with the time left on a terminal, plain lines in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SHOWN = {"loss": "loss", "rewards/accuracies": "accuracy", "rewards/margins": "margin", "learning_rate": "lr"}


class ProgressLine:
    """``with ProgressLine("train", total=200, start=100) as line: line.advance(figures)``.

    Args:
        title: what is running.
        total: steps in all.
        start: steps done by an earlier run; they do not count for the speed.
        visible: False in all processes but the main one.
        every_seconds: the least time between two plain lines.
    """

    def __init__(
        self,
        title: str,
        *,
        total: int,
        start: int = 0,
        visible: bool = True,
        every_seconds: float = 10.0,
        console: Console | None = None,
    ):
        self.title, self.total, self.start, self.done = title, total, start, start
        self.visible, self.every_seconds = visible, every_seconds
        self.console = console or Console(file=sys.stderr)
        self.live: Progress | None = None

    def __enter__(self) -> ProgressLine:
        self.began = self.last_line = time.monotonic()
        if self.visible and self.console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
            self.live = Progress(
                TextColumn("{task.description}"), *columns, TextColumn("{task.fields[figures]}"), console=self.console
            )
            self.task = self.live.add_task(self.title, total=self.total, completed=self.start, figures="")
            self.live.start()
        return self

    def advance(self, figures: Mapping[str, Any] | None = None, *, count: int = 1) -> None:
        """``count`` steps are done; ``figures`` are shown beside the bar."""
        self.done += count
        if not self.visible:
            return
        text = _short(figures or {})
        if self.live is not None:
            self.live.update(self.task, completed=self.done, figures=text)
        elif time.monotonic() - self.last_line >= self.every_seconds or self.done >= self.total:
            self.last_line = time.monotonic()
            self.console.print(f"{self.title} {self.done}/{self.total}  {self._time_left()}  {text}", highlight=False)

    def _time_left(self) -> str:
        speed = (self.done - self.start) / max(1e-9, time.monotonic() - self.began)
        seconds = round((self.total - self.done) / speed) if speed else 0
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d} left"

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.live is not None:
            self.live.stop()


def _short(figures: Mapping[str, Any]) -> str:
    return "  ".join(f"{short} {figures[name]:.4g}" for name, short in SHOWN.items() if name in figures)
