"""How the processes of a service fare while something is done to it: memory, files, threads, processor; and whether memory stays flat.

Flat: what a straight line through the samples (least squares) grows from the first to the last is less than a bound, which is stated with
each figure. The samples of a warm-up are left out.
"""

import asyncio
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from redis import Redis
from redis.exceptions import RedisError

EVERY_S = 1.0
MIB = 1 << 20
_TICKS = os.sysconf("SC_CLK_TCK")
_NAMES = {"app.cli up": "supervisor", "app.cli api": "api", "app.cli worker": "worker", "valkey-server": "redis"}


def processes(session: int) -> dict[str, int]:
    """Name → process id, of those of `dit up` that live in this session."""
    found: dict[str, int] = {}
    for entry in Path("/proc").iterdir():
        with suppress(OSError):  # it has just ended
            if entry.name.isdigit() and os.getsid(int(entry.name)) == session:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                name = next((name for part, name in _NAMES.items() if part in command), "")
                if name and not _is_fork_of(entry, found.get(name)):
                    found[name] = int(entry.name)
    return found


def _is_fork_of(entry: Path, parent: int | None) -> bool:
    """A fork of one that is known, such as the one with which Redis rewrites its file."""
    return parent is not None and int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == parent


@dataclass(frozen=True)
class Sample:
    """Of one process."""

    t: float  # monotonic, s
    rss_bytes: int
    files: int
    threads: int
    cpu_s: float  # since its start


def look(pid: int) -> Sample:
    """OSError if it has ended."""
    at = Path(f"/proc/{pid}")
    fields = (at / "stat").read_text().rpartition(")")[2].split()
    threads, cpu_s, rss_bytes = int(fields[17]), (int(fields[11]) + int(fields[12])) / _TICKS, int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
    return Sample(time.monotonic(), rss_bytes, len(os.listdir(at / "fd")), threads, cpu_s)


def growth(times: Sequence[float], values: Sequence[float]) -> float:
    """What the line of least squares through them grows over all the time."""
    if len(times) < 3:
        return 0.0
    slope = np.polyfit(np.array(times) - times[0], values, 1)[0]
    return float(slope) * (times[-1] - times[0])


@dataclass
class Watch:
    """`async with Watch(…)`: samples of each process, and of what Redis says it uses, every second."""

    pids: dict[str, int]
    redis: Redis
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    used: list[tuple[float, int]] = field(default_factory=list)  # (t, bytes) of Redis' data

    async def __aenter__(self) -> "Watch":
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()

    async def _run(self) -> None:
        while True:
            self.look()
            await asyncio.sleep(EVERY_S)

    def look(self) -> None:
        for name, pid in self.pids.items():
            with suppress(OSError):  # a process that was ended on purpose
                self.samples.setdefault(name, []).append(look(pid))
        with suppress(RedisError, OSError):
            info: Any = self.redis.info("memory")
            self.used.append((time.monotonic(), info["used_memory"]))

    def figures(self, start: float, end: float, bound: "Bound") -> dict[str, dict[str, Any]]:
        """Of each process, from the samples of [start, end]; memory in MiB."""
        inside = {name: [sample for sample in samples if start <= sample.t <= end] for name, samples in self.samples.items()}
        told = {name: _figures(samples, bound) for name, samples in inside.items() if samples}
        used = [(t, value) for t, value in self.used if start <= t <= end]
        if used:
            told["redis data"] = _memory([t for t, _ in used], [value for _, value in used], bound)
        return told


@dataclass(frozen=True)
class Bound:
    """Of what memory may grow over the time that is looked at: the larger of the two."""

    mib: float
    share: float  # of its mean

    def of(self, mean_bytes: float) -> float:
        return max(self.mib * MIB, self.share * mean_bytes)


def _memory(times: Sequence[float], values: Sequence[float], bound: Bound) -> dict[str, Any]:
    grown, mean = growth(times, values), float(np.mean(values))
    return {
        "mib_first": round(values[0] / MIB, 1),
        "mib_last": round(values[-1] / MIB, 1),
        "mib_most": round(max(values) / MIB, 1),
        "grown_mib": round(grown / MIB, 2),
        "mib_an_hour": round(3600 * grown / (times[-1] - times[0]) / MIB, 1) if times[-1] > times[0] else 0.0,
        "bound_mib": round(bound.of(mean) / MIB, 1),
        "flat": grown <= bound.of(mean),
    }


def _figures(samples: Sequence[Sample], bound: Bound) -> dict[str, Any]:
    first, last = samples[0], samples[-1]
    return {
        **_memory([sample.t for sample in samples], [sample.rss_bytes for sample in samples], bound),
        "files": [min(sample.files for sample in samples), max(sample.files for sample in samples)],
        "threads": [min(sample.threads for sample in samples), max(sample.threads for sample in samples)],
        "cores": round((last.cpu_s - first.cpu_s) / max(last.t - first.t, 1e-9), 2),
    }


def table(told: dict[str, dict[str, Any]]) -> str:
    """The figures for a person."""
    lines = ["  process      RSS MiB first    last    most   grown  (bound)   files      threads   cores"]
    for name, value in told.items():
        first, last, most = (value[f"mib_{when}"] for when in ("first", "last", "most"))
        memory = f"{first:13.1f} {last:7.1f} {most:7.1f} {value['grown_mib']:7.2f} {value['bound_mib']:8.1f}"
        rest = f"{value['files']!s:>12} {value['threads']!s:>10} {value['cores']:6.2f}" if "files" in value else ""
        lines.append(f"  {name:<12}{memory} {rest}{'' if value['flat'] else '   GROWS'}")
    return "\n".join(lines)
