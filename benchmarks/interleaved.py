"""Compares two functions on a machine that others may use: pairs of calls in turn, ratios per pair, medians."""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

QUIET = 0.05  # share of the processors that other processes may use during a pair that counts as undisturbed
STAT = Path("/proc/stat")


@dataclass(frozen=True)
class Call:
    """What one call took: seconds, processor seconds, share of the processors that other processes used (or None)."""

    wall: float
    cpu: float
    others: float | None


def measure(function: Callable) -> Call:
    """Call once."""
    busy, cpu, wall = _busy_seconds(), time.process_time(), time.perf_counter()
    function()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    others = None if busy is None else max(0.0, _busy_seconds() - busy - cpu) / (wall * os.cpu_count())
    return Call(wall, cpu, others)


def _busy_seconds() -> float | None:
    """Processor seconds that all processes have used since the machine started; None where that is not known."""
    if not STAT.is_file():
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, STAT.read_text(encoding="utf-8").split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


@dataclass
class Pairs:
    """Calls of two functions in turn."""

    reference: list[Call] = field(default_factory=list)
    ours: list[Call] = field(default_factory=list)

    def add(self, reference: Callable, ours: Callable) -> None:
        """Measure one pair; the order alternates."""
        turn = [(reference, self.reference), (ours, self.ours)]
        for function, calls in turn if len(self.ours) % 2 == 0 else turn[::-1]:
            calls.append(measure(function))

    def undisturbed(self) -> "Pairs":
        """The pairs during which other processes left the machine alone."""
        quiet = [pair for pair in zip(self.reference, self.ours) if all((call.others or 0) <= QUIET for call in pair)]
        return Pairs([pair[0] for pair in quiet], [pair[1] for pair in quiet])

    def ratios(self, clock: str) -> list[float]:
        """ours / reference per pair by `wall` or `cpu` seconds."""
        return [getattr(ours, clock) / getattr(reference, clock) for reference, ours in zip(self.reference, self.ours)]


def quartiles(values: list[float]) -> list[float]:
    """[first quartile, median, third quartile]; the value itself three times when there is one, [] when none."""
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
