"""Runs tasks within a time budget, and writes each result to a file before the next task begins."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peanut.files import write_json

__all__ = ["Check", "Outcome", "Task", "told"]

LEAST = 5.0
"""Seconds below which no task is begun."""


@dataclass
class Outcome:
    """What a task found; what of it was cut for want of time, and why it failed, if it did."""

    results: dict[str, Any]
    cut: str = ""
    error: str = ""


Task = Callable[[float], Outcome]
"""Given the seconds that it should take."""


class Check:
    """What has been found so far, on a clock, and the file that says so.

    Args:
        file: where to.
        about: what is known before anything is measured.
        seconds: the budget.
    """

    def __init__(self, file: Path, about: Mapping[str, Any], seconds: float) -> None:
        self.file, self.seconds, self.start = file, seconds, time.perf_counter()
        self.cut: list[str] = []
        self.parts: dict[str, Any] = {}
        self.found = {**about, "minutes": seconds / 60, "cut": self.cut, "parts": self.parts}

    def spent(self) -> float:
        """Seconds since the beginning."""
        return time.perf_counter() - self.start

    def run(self, name: str, tasks: Mapping[str, Task], share: float, about: Mapping[str, Any] | None = None) -> None:
        """Runs the tasks of a part, each if there is time for it; one that fails leaves its error, and the next is run.

        Args:
            name: the part's.
            tasks: by name.
            share: at which share of the budget the part has to be done.
            about: what else the file says of the part.
        """
        begin, deadline, shortest = self.spent(), self.seconds * share, LEAST
        part = self.parts[name] = {"seconds": 0.0, "errors": {}, "results": {}, **(about or {})}
        for index, (key, task) in enumerate(tasks.items()):
            before = self.spent()
            if deadline - before < shortest:
                self._cut(f"{name}: {key}")
                continue
            told(f"{name}: {key} …")
            try:
                outcome = task((deadline - before) / (len(tasks) - index))
            except Exception as error:
                outcome = Outcome({}, error=traceback.format_exc())
                told(f"  {type(error).__name__}: {error}")
            took = self.spent() - before
            shortest = took if index == 0 else min(shortest, took)
            part["seconds"] = self.spent() - begin
            for kind, found in (("results", outcome.results), ("errors", outcome.error)):
                part[kind] |= {key: found} if found else {}
            if outcome.cut:
                self._cut(f"{name}: {key} {outcome.cut}")
            self.write()
            told(f"  {'failed after' if outcome.error else 'done in'} {took:.1f} s, {self.spent():.0f} s in all")

    def write(self, finished: bool = False) -> None:
        """Writes the file."""
        write_json(self.file, {**self.found, "seconds": self.spent(), "finished": finished})

    @property
    def failed(self) -> int:
        """How many tasks have an error."""
        return sum(len(part["errors"]) for part in self.parts.values())

    def _cut(self, what: str) -> None:
        self.cut.append(what)
        told(f"cut for want of time: {what}")


def told(line: str) -> None:
    """Prints a line at once, so that a log shows where the run is."""
    print(line, flush=True)
