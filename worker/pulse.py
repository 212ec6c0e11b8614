"""A file in which a worker says how it fares, for `dit health worker` beside it: does its loop go round, does Redis hear of it?

It is no key of Redis: when Redis is away, that must not look like workers that stand still, or an orchestrator would restart them all.
Times are of the monotonic clock, which all processes of a machine share. One worker a host name: a container has its own.
"""

import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path

SILENT_S = 30.0  # after which a worker that says nothing, or that Redis has not heard, is not well; it tries every 2 s


@dataclass(frozen=True)
class Pulse:
    """What a worker says of itself."""

    pid: int
    models: list[str]
    at: float  # monotonic, as the next two: when this was written
    came_round: float  # when its loop did last
    heard: float | None  # when Redis last took its promises
    may_stand_s: float  # how long its loop may stay away, for a long step or for a Redis that is waited for

    def write(self, path: Path) -> None:
        """OSError where that cannot be done. A reader sees the old one or the new one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(asdict(self)))
        os.replace(part, path)


def pulse_path(data: Path) -> Path:
    """Of the worker on this host: containers may share the folder, since each has a name of its own."""
    return data / "workers" / f"{socket.gethostname()}.json"


def ailment(path: Path, *, only_alive: bool = False) -> str | None:
    """What is wrong with the worker that writes this file, or None. `only_alive` asks whether it moves, and not whether it serves."""
    try:
        pulse = Pulse(**json.loads(path.read_text()))
    except FileNotFoundError:
        return f"no worker has written {path}; it does when it has loaded its models"
    except (OSError, ValueError, TypeError) as error:
        return f"{path} cannot be read: {error}"
    now = time.monotonic()
    silent_s, stood_s = now - pulse.at, now - pulse.came_round
    if not 0 <= silent_s <= SILENT_S:  # less than nothing: the machine was started since
        return f"the worker (process {pulse.pid}) has said nothing for {silent_s:.0f} s"
    if stood_s > pulse.may_stand_s:
        return f"the loop of the worker (process {pulse.pid}) has stood still for {stood_s:.0f} s"
    if only_alive:
        return None
    if pulse.heard is None or now - pulse.heard > SILENT_S:
        return f"Redis has not heard of the worker (process {pulse.pid}) for more than {SILENT_S:.0f} s"
    return None if pulse.models else f"the worker (process {pulse.pid}) serves no model"
