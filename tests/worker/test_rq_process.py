"""What rq sees of a worker, and what it makes of rq's commands: its own tools, run as they are, agree with it."""

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from rq import suspension
from rq.command import send_shutdown_command, send_stop_execution_command, send_stop_job_command
from rq.exceptions import StopRequested
from rq.serializers import JSONSerializer
from rq.utils import now

from worker import protocol
from worker.engine import Engine
from worker.protocol import GenerationRequest, ModelRecord
from worker.rq_worker import DiTWorker
from worker.runner import Runner

MakeRequest = Callable[..., GenerationRequest]
MakeWorker = Callable[..., DiTWorker]


def rq(redis_url: str, *arguments: str) -> str:
    """rq's own command line."""
    done = subprocess.run([sys.executable, "-m", "rq.cli", *arguments, "-u", redis_url], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def info(redis_url: str) -> tuple[dict[str, Any], dict[str, tuple[str, int, int]]]:
    """`rq info` → the queue's numbers; each worker's state, jobs finished and jobs failed."""
    told = rq(redis_url, "info", "--raw")
    queue = re.search(r"^queue dit-tiny (\d+), (\d+) executing, (\d+) finished, (\d+) failed$", told, re.M)
    assert queue, told
    numbers = dict(zip(("waiting", "executing", "finished", "failed"), map(int, queue.groups()), strict=True))
    workers = re.findall(r"^worker (\w+) \(.*\) (\w+) dit-tiny\. jobs: (\d+) finished, (\d+) failed$", told, re.M)
    return numbers, {name: (state, int(finished), int(failed)) for name, state, finished, failed in workers}


@pytest.mark.usefixtures("in_this_process")
def test_rq_info_shows_the_truth(redis_url: str, jobs: Any, worker: DiTWorker, make_request: MakeRequest) -> None:
    for request in (make_request(steps=9), make_request(steps=9), make_request(sampler="none"), make_request(class_labels=(0,) * 9)):
        jobs.submit(request)
    seen: list[Any] = []
    worker.engine.before[2] = lambda: seen.append(info(redis_url))
    worker.engine.before[3] = lambda: jobs.submit(make_request())
    worker.work(burst=True)
    [(numbers, workers)] = seen
    assert numbers == {"waiting": 0, "executing": 3, "finished": 0, "failed": 1}
    assert workers == {worker.name: ("busy", 0, 1)}
    numbers, workers = info(redis_url)
    assert numbers == {"waiting": 0, "executing": 0, "finished": 4, "failed": 1}
    assert workers == {}, "it has signed off"


@pytest.mark.usefixtures("in_this_process")
def test_rq_info_shows_an_idle_worker_with_what_it_has_done(
    redis_url: str, jobs: Any, worker: DiTWorker, make_request: MakeRequest
) -> None:
    jobs.submit(make_request()), jobs.submit(make_request(class_labels=(9,)))
    seen: list[Any] = []
    listen = worker._listen

    def look() -> None:
        seen.append(info(redis_url))
        worker._stop_requested = True
        listen()

    worker._listen = look
    worker.work()
    assert seen == [({"waiting": 0, "executing": 0, "finished": 1, "failed": 1}, {worker.name: ("idle", 1, 1)})]


@pytest.mark.usefixtures("in_this_process")
def test_jobs_that_rq_info_puts_back_into_the_queue_are_not_lost(
    redis_url: str, jobs: Any, make_worker: MakeWorker, make_request: MakeRequest
) -> None:
    """It cleans leases in rq's own way, without a word to us: the job waits there, and is still running here."""
    job, dead = jobs.submit(make_request()), make_worker()
    for attempt in range(protocol.MAX_ATTEMPTS):
        found = dead._take(idle=True)
        assert found
        dead._lease(found[0])
        dead.engine.remove(job)
        dead.leases.clear()
        jobs.expire_leases()
        assert info(redis_url)[0] == {"waiting": 1, "executing": 0, "finished": 0, "failed": 0}
        assert (jobs.status(job), jobs.record(job)["attempts"]) == ("running", str(attempt + 1))
    last = make_worker()
    last.work(burst=True)
    assert (jobs.status(job), jobs.rq_status(job), last.engine.ticks) == ("failed", "failed", 0)
    assert jobs.record(job)["error"] == "given up after 5 attempts, each ended by its worker's death"
    assert jobs.dead() == [job]


# Several models.


class TwoModels:
    """Two models on two runners, of which one may go."""

    def __init__(self, runners: dict[str, Runner], record: ModelRecord) -> None:
        self.runners = runners
        self.served = {name: replace(record, id=name) for name in runners}

    crowded = False

    def records(self) -> list[ModelRecord]:
        return list(self.served.values())

    def runner(self, model: str, checkpoint: str) -> Runner:
        return self.runners[model]

    def poll(self, busy: set[str]) -> None:
        pass


@pytest.fixture
def models(make_runner: Callable[..., Runner], record: ModelRecord) -> TwoModels:
    return TwoModels({"one": make_runner(), "other": make_runner(seed=1)}, record)


@pytest.fixture
def both(models: TwoModels, connect: Callable[[], Redis], redis: Redis) -> DiTWorker:
    return DiTWorker(Engine(models), connect(), drain_s=0, hang_s=None)


@pytest.mark.usefixtures("in_this_process")
def test_one_worker_does_the_jobs_of_all_its_models(redis: Redis, jobs: Any, both: DiTWorker, make_request: MakeRequest) -> None:
    ids = {model: [jobs.submit(make_request(model=model)) for _ in range(3)] for model in ("one", "other")}
    both.work(burst=True)
    pictures = {model: [jobs.images(job) for job in ids[model]] for model in ids}
    assert pictures["one"][0] != pictures["other"][0]
    assert all(found == [found[0]] * 3 for found in pictures.values())
    assert [redis.get(protocol.model_key(model)) for model in ids] == [None, None], "they end with their only worker"


@pytest.mark.usefixtures("in_this_process")
def test_a_model_that_comes_or_goes_is_told_to_rq_and_to_the_api(redis: Redis, models: TwoModels, both: DiTWorker) -> None:
    def served() -> tuple[list[str], set[bytes], set[bytes]]:
        told = redis.hget(both.key, "queues").decode().split(",")
        return told, redis.smembers("rq:workers:dit-one"), redis.smembers("rq:workers:dit-other")

    both.register_birth()
    both._registered = both.queue_names()
    key = both.key.encode()
    other = models.served.pop("other")
    both._update_models()
    assert served() == (["dit-one"], {key}, set())
    models.served["other"] = other
    both._update_models()
    assert served() == (["dit-one", "dit-other"], {key}, {key})
    del models.served["one"]
    both._update_models()
    assert served() == (["dit-other"], set(), {key})
    both._renew()
    assert redis.get(protocol.model_key("one")) is None and redis.get(protocol.model_key("other")) is not None


# Suspension.


@pytest.mark.usefixtures("in_this_process", "quick")
def test_a_suspended_worker_ends_what_runs_and_takes_nothing_more_until_it_is_resumed(
    redis_url: str, redis: Redis, jobs: Any, worker: DiTWorker, make_worker: MakeWorker, make_request: MakeRequest
) -> None:
    running, later = jobs.submit(make_request(steps=9)), []

    def suspend() -> None:
        rq(redis_url, "suspend")
        later.append(jobs.submit(make_request()))

    worker.engine.before[2] = suspend
    worker.work(burst=True)
    assert jobs.status(running) == "succeeded"
    assert (jobs.waiting(), jobs.status(later[0])) == (later, "queued")
    rq(redis_url, "resume")
    make_worker().work(burst=True)
    assert jobs.status(later[0]) == "succeeded"


@pytest.mark.usefixtures("in_this_process")
def test_an_idle_worker_rests_while_suspended_says_so_and_goes_on(
    redis: Redis, jobs: Any, worker: DiTWorker, make_request: MakeRequest
) -> None:
    suspension.suspend(redis)
    job = jobs.submit(make_request())
    seen: list[Any] = []

    def resume() -> None:
        while redis.hget(worker.key, "state") != b"suspended":
            time.sleep(0.01)
        seen.append((jobs.status(job), worker.get_state()))
        suspension.resume(redis)
        while jobs.status(job) != "succeeded":
            time.sleep(0.01)
        worker._stop_requested = True

    thread = threading.Thread(target=resume)
    thread.start()
    worker.work()
    thread.join(60)
    assert seen == [("queued", "suspended")] and jobs.status(job) == "succeeded"


# Commands.


def message(**payload: Any) -> dict[str, Any]:
    return {"type": "message", "data": json.dumps(payload).encode()}


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("command", ["stop-job", "stop-execution"])
def test_a_stop_command_ends_that_job_at_its_next_step_and_no_other(
    redis: Redis, jobs: Any, worker: DiTWorker, make_request: MakeRequest, command: str
) -> None:
    neighbour, job = jobs.submit(make_request(steps=9)), jobs.submit(make_request(steps=1000))
    worker.engine.before[3] = lambda: worker.handle_payload(message(command=command, job_id=job, execution_id="of any kind"))
    worker.work(burst=True)
    assert (jobs.status(job), jobs.rq_status(job)) == ("canceled", "stopped")
    assert jobs.events(job)[-1] == ("done", {"status": "canceled"})
    assert (jobs.status(neighbour), jobs.rq_status(neighbour)) == ("succeeded", "finished")
    assert jobs.leftovers() == [] and redis.zscore("rq:failed:dit-tiny", job) is not None
    assert worker._stopped_job_id is None, "the next failure is one"


@pytest.mark.parametrize(
    "junk",
    [
        {"data": b"no JSON"},
        {"data": b"\xff"},
        {"data": b"[]"},
        {"data": b"7"},
        {},
        message(),
        message(command="stop-job"),
        message(command="x"),
    ],
    ids=str,
)
def test_what_is_no_command_is_passed_over(worker: DiTWorker, junk: dict[str, Any]) -> None:
    worker.handle_payload(junk)
    assert worker._stop_asked.empty()


def test_a_stop_of_a_job_that_runs_elsewhere_does_nothing(worker: DiTWorker) -> None:
    worker.handle_payload(message(command="stop-job", job_id="nobody"))
    worker.handle_payload(message(command="stop-job", job_id=["no", "id"]))
    worker._stop_jobs()
    assert worker._stop_asked.empty()


def test_the_thread_that_hears_commands_outlives_a_timeout(worker: DiTWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.rq_process.LATER_S", 0)
    worker._pubsub_exception_handler(TimeoutError(), None, None)
    with pytest.raises(RuntimeError, match="broken"):
        try:
            raise RuntimeError("broken")
        except RuntimeError as error:
            worker._pubsub_exception_handler(error, None, None)


# Signals.


def ask_to_stop(worker: DiTWorker) -> None:
    """What SIGTERM does."""
    worker._shutdown_requested_date = now()
    worker._shutdown()


@pytest.mark.usefixtures("in_this_process", "quick")
def test_after_sigterm_what_runs_is_finished_and_nothing_is_taken(jobs: Any, make_worker: MakeWorker, make_request: MakeRequest) -> None:
    worker, job = make_worker(drain_s=60), jobs.submit(make_request(steps=9))
    waiting: list[str] = []

    def stop() -> None:
        ask_to_stop(worker)
        waiting.append(jobs.submit(make_request()))

    worker.engine.before[2] = stop
    worker.work()
    assert (jobs.status(job), jobs.record(job)["attempts"]) == ("succeeded", "1")
    assert (jobs.waiting(), jobs.status(waiting[0])) == (waiting, "queued")


@pytest.mark.usefixtures("in_this_process")
def test_a_second_signal_gives_back_at_once_unless_it_is_the_first_ones_double(
    jobs: Any, make_worker: MakeWorker, make_request: MakeRequest
) -> None:
    worker = make_worker(drain_s=1000)
    short, long = jobs.submit(make_request(steps=6)), jobs.submit(make_request(steps=1000))

    def again_after(seconds: float) -> None:
        worker._shutdown_requested_date = now() - timedelta(seconds=seconds)
        worker.request_force_stop(signal.SIGTERM, None)

    worker.engine.before = {1: lambda: ask_to_stop(worker), 2: lambda: again_after(0.5), 20: lambda: again_after(1.5)}
    worker.work()
    assert worker.engine.ticks == 21
    assert (jobs.status(short), jobs.status(long)) == ("succeeded", "queued")
    assert jobs.waiting() == [long] and jobs.record(long)["attempts"] == "0"


@pytest.mark.usefixtures("in_this_process")
def test_a_signal_is_obeyed_from_the_moment_on_that_the_worker_is_known(
    jobs: Any, worker: DiTWorker, make_request: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    monkeypatch.setattr(worker, "_install_signal_handlers", lambda: order.append("signals"))
    birth = worker.register_birth

    def born_and_told_to_stop() -> None:
        order.append("birth")
        birth()
        ask_to_stop(worker)

    monkeypatch.setattr(worker, "register_birth", born_and_told_to_stop)
    job = jobs.submit(make_request())
    worker.work()
    assert order[:2] == ["signals", "birth"]
    assert jobs.waiting() == [job] and not jobs.redis.exists("rq:workers", protocol.model_key("tiny"))


def test_a_signal_raises_only_where_nothing_can_be_lost(worker: DiTWorker) -> None:
    ask_to_stop(worker)
    assert worker._stop_requested
    worker._listening = True
    with pytest.raises(StopRequested):
        ask_to_stop(worker)


def test_a_worker_asked_to_stop_before_it_listens_does_not_listen(worker: DiTWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker.intake, "listen", lambda models: pytest.fail("it would sleep"))
    worker._stop_requested = True
    worker._listen()
    assert not worker._listening


# The process.

SERVE = """
import sys
from pathlib import Path
from worker.serve import serve
registry, url, drain_s = sys.argv[1:]
serve(redis_url=url, registry=Path(registry), models=None, device="cpu", dtype="float32", max_rows=8, compile=False, drain_s=float(drain_s))
"""


class Process:
    """`worker.serve` as `dit worker` starts it, from a checkpoint on disk."""

    def __init__(self, registry: Path, url: str, drain_s: float) -> None:
        self.errors = registry / "errors"
        with self.errors.open("w") as file:
            self.process = subprocess.Popen([sys.executable, "-c", SERVE, str(registry), url, str(drain_s)], stderr=file)

    def until(self, condition: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + 300
        while not (found := condition()):
            assert time.monotonic() < deadline and self.process.poll() is None, self.errors.read_text()
            time.sleep(0.02)
        return found

    def ends(self) -> int:
        status = self.process.wait(120)
        assert "Traceback" not in self.errors.read_text(), self.errors.read_text()
        return status


@pytest.fixture
def serving(redis_url: str, redis: Redis, make_checkpoint: Callable[..., Path], tmp_path: Path) -> Any:
    """`serving(drain_s)` starts a worker's process; `serving.checkpoint` is what it serves."""
    folder = make_checkpoint(tmp_path / "registry")
    started: list[Process] = []

    def start(drain_s: float = 0.0) -> Process:
        started.append(Process(folder.parent, redis_url, drain_s))
        return started[-1]

    start.checkpoint = json.loads((folder / "checkpoint.json").read_text())["hash"]
    yield start
    for process in started:
        process.process.kill()
        process.process.wait()


def test_sigterm_gives_the_job_back_and_ends_the_process(redis: Redis, jobs: Any, serving: Any, make_request: MakeRequest) -> None:
    worker = serving()
    job = jobs.submit(make_request(steps=1000, class_labels=(0,) * 64), checkpoint=serving.checkpoint)
    worker.until(lambda: int(jobs.record(job).get("step", 0)))
    served = ModelRecord.parse(redis.get("dit:model:tiny"))
    assert (served.checkpoint, served.dtype, served.max_rows) == (serving.checkpoint, "float32", 8)
    worker.process.send_signal(signal.SIGTERM)
    assert worker.ends() == 0
    assert (jobs.status(job), jobs.waiting(), jobs.leftovers()) == ("queued", [job], [jobs.queue])
    assert redis.get("dit:model:tiny") is None


def test_a_second_sigterm_ends_the_drain(redis: Redis, jobs: Any, serving: Any, make_request: MakeRequest) -> None:
    worker = serving(drain_s=1000)
    job = jobs.submit(make_request(steps=1000, class_labels=(0,) * 64), checkpoint=serving.checkpoint)
    worker.until(lambda: int(jobs.record(job).get("step", 0)))
    worker.process.send_signal(signal.SIGTERM)
    step = int(jobs.record(job)["step"])
    worker.until(lambda: int(jobs.record(job)["step"]) > step)
    time.sleep(2.0)  # a double of the first one comes within a second
    worker.process.send_signal(signal.SIGTERM)
    assert worker.ends() == 0
    assert (jobs.status(job), jobs.waiting()) == ("queued", [job])


def test_an_idle_process_does_what_comes_and_ends_with_sigterm(redis: Redis, jobs: Any, serving: Any, make_request: MakeRequest) -> None:
    worker = serving()
    worker.until(lambda: redis.get("dit:model:tiny"))
    for _ in range(2):
        worker.until(lambda: redis.info("clients")["blocked_clients"])
        job = jobs.submit(make_request(), checkpoint=serving.checkpoint)
        worker.until(lambda job=job: jobs.status(job) == "succeeded")
    worker.process.send_signal(signal.SIGTERM)
    assert worker.ends() == 0


def test_the_commands_of_rq_reach_the_process(redis: Redis, jobs: Any, serving: Any, make_request: MakeRequest) -> None:
    worker = serving()
    first, second, third = (jobs.submit(make_request(steps=1000, class_labels=(0,) * 64), checkpoint=serving.checkpoint) for _ in range(3))
    worker.until(lambda: int(jobs.record(second).get("step", 0)))
    send_stop_job_command(redis, first, serializer=JSONSerializer)
    worker.until(lambda: jobs.status(first) == "canceled")
    send_stop_execution_command(redis, second, jobs.record(second)["execution"])
    worker.until(lambda: jobs.status(second) == "canceled")
    worker.until(lambda: jobs.status(third) == "running")
    [name] = redis.smembers("rq:workers")
    send_shutdown_command(redis, name.decode().removeprefix("rq:worker:"))
    assert worker.ends() == 0
    assert [jobs.rq_status(job) for job in (first, second, third)] == ["stopped", "stopped", "queued"]
    assert jobs.waiting() == [third]
