"""An engine on one runner, run to its end, and what came of it; for the tests of the engine and of its promise."""

from collections.abc import Callable
from typing import Any

from worker.engine import Engine, Event, ImageReady, JobDone, JobFailed
from worker.models import OneModel
from worker.protocol import GenerationRequest, ModelRecord
from worker.runner import Runner

Jobs = dict[str, GenerationRequest]
Events = list[tuple[int, Event]]  # with the tick of each


def record_of(runner: Runner, model: str = "tiny") -> ModelRecord:
    """As little as the engine needs."""
    return ModelRecord(model, runner.checkpoint.hash, [], 16, 1, "flow", [], 1000, {})


def start(runner: Runner, jobs: Jobs, trace: Callable[[dict[str, Any]], None] | None = None) -> Engine:
    """An engine that has these jobs."""
    engine = Engine(OneModel(runner, record_of(runner)), trace)
    for name, request in jobs.items():
        engine.add(name, request, runner.checkpoint.hash)
    return engine


def traced(runner: Runner, jobs: Jobs) -> tuple[Engine, list[dict[str, Any]]]:
    """The engine, and the entries of its trace to come, without those of ticks that only waited."""
    entries: list[dict[str, Any]] = []
    return start(runner, jobs, lambda entry: entries.append(entry) if entry["pictures"] or entry["decoded"] else None), entries


def slot_of(engine: Engine, job: str, index: int) -> int:
    """Of a picture that has started, on an engine with one lane."""
    (lane,) = engine.lanes.values()
    return next(picture.slot for picture in lane.scheduler.jobs[job].running if picture.index == index)


def drain(engine: Engine, before_tick: Callable[[int], None] = lambda tick: None, at_most: int = 2000) -> Events:
    """Tick until nothing is left."""
    events: Events = []
    tick = 0
    while engine.busy:
        before_tick(tick)
        events += [(tick, event) for event in engine.tick()]
        tick += 1
        assert tick < at_most, "the engine does not come to an end"
    return events


def images(events: Events) -> dict[tuple[str, int], bytes]:
    """(job, index) → PNG."""
    return {(event.job_id, event.index): event.png for _, event in events if isinstance(event, ImageReady)}


def pictures(runner: Runner, jobs: Jobs) -> dict[tuple[str, int], bytes]:
    """(job, index) → PNG of these jobs, run together and undisturbed."""
    return images(drain(start(runner, jobs)))


def ends(events: Events) -> dict[str, str]:
    """Job → how it ended; each ends once."""
    found = [(e.job_id, "done" if isinstance(e, JobDone) else e.message) for _, e in events if isinstance(e, JobDone | JobFailed)]
    assert len({name for name, _ in found}) == len(found), "a job ended twice"
    return dict(found)


def assert_empty(engine: Engine) -> None:
    """Nothing of any job is left."""
    engine.tick()  # lanes without jobs go at the next one
    assert not engine.busy and not engine.lanes and not engine._encoding
