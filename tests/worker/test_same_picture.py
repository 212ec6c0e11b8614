"""The promise of the service: the same request gives the same picture, bit for bit, alone and in any crowd, and again on another process.

In the mode that is served by default (bfloat16 where the processor has it, compiled where there is a compiler) and in plain float32.
"""

import hashlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.worker.engines import Jobs, drain, ends, images, pictures, start
from tests.worker.plays import LABELS, SAMPLERS, alone
from worker.device import can_compile, choose_dtype
from worker.load import Loader
from worker.protocol import ALL_CHANNELS, FIRST_THREE_CHANNELS, LARGEST_SEED, GenerationRequest
from worker.runner import Runner

ROOT = Path(__file__).parents[2]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MAX_ROWS = 16
LEAST_PSNR_DB = 40  # on CUDA, where not told to be reproducible

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),  # torch's own, on the way to its compiler
    pytest.mark.timeout(1200),
]


# --- the modes ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mode:
    """How a worker runs its models."""

    device: torch.device
    dtype: torch.dtype
    compile: bool
    reproducible: bool = False
    block_cache: bool = False

    def loader(self) -> Loader:
        options = {"compile": self.compile, "reproducible": self.reproducible, "block_cache": self.block_cache}
        return Loader(self.device, self.dtype, max_rows=MAX_ROWS, **options)


def modes(device: torch.device) -> dict[str, Mode]:
    served, plain = Mode(device, choose_dtype("auto", device), can_compile(device)), Mode(device, torch.float32, False)
    return {
        "as served": served,
        "reproducible": replace(served, reproducible=True),
        "float32": plain,
        "block cache": replace(plain, block_cache=True),
    }


_FOLDERS: dict[tuple[str, int], Path] = {}  # made once a session, as the runners, which take half a minute to compile
_RUNNERS: dict[tuple[Mode, str], Runner] = {}


@pytest.fixture
def folder_of(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`folder_of(objective, depth=2)`: a tiny checkpoint; `diffusion` has a learned covariance."""

    def make(objective: str, depth: int = 2) -> Path:
        if (objective, depth) not in _FOLDERS:
            _FOLDERS[objective, depth] = make_checkpoint(tmp_path_factory.mktemp("model"), objective, depth=depth)
        return _FOLDERS[objective, depth]

    return make


@pytest.fixture
def runner_of(folder_of: Callable[..., Path]) -> Callable[[Mode, str], Runner]:
    """`runner_of(mode, objective)`: that checkpoint as a worker loads it; a block cache needs more blocks than two."""

    def make(mode: Mode, objective: str) -> Runner:
        if (mode, objective) not in _RUNNERS:
            runner = _RUNNERS[mode, objective] = mode.loader()(folder_of(objective, 4 if mode.block_cache else 2))
            assert runner.compiled == mode.compile, "the compiler failed; the log says how"
        return _RUNNERS[mode, objective]

    return make


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """The CPU's kernels share rows out among threads, and so depend most on how many rows there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


# --- crowds ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arrival:
    """A job of a crowd."""

    after: int  # ticks after the one before
    request: GenerationRequest
    stays: int | None  # ticks after which it is removed, if it is


@dataclass(frozen=True)
class Crowd:
    max_rows: int
    arrivals: list[Arrival]


@st.composite
def requests(draw: Callable[[Any], Any], objective: str, block_cache: bool) -> GenerationRequest:
    sampler = draw(st.sampled_from(SAMPLERS[objective]))
    low, high = sorted(draw(st.tuples(*[st.sampled_from([0.0, 0.25, 0.5, 0.8, 1.0])] * 2)))
    labels = draw(st.lists(st.sampled_from(LABELS), min_size=1, max_size=5))
    return GenerationRequest(
        model="tiny",
        class_labels=tuple(labels),
        guidance_scale=draw(st.sampled_from([1.0, 1.0, 1.5, 4.0, 20.0])),
        guidance_interval=draw(st.sampled_from([(0.0, 1.0), (low, high)])),
        steps=draw(st.integers(1, 8)),
        sampler=sampler,
        seed=draw(st.one_of(st.integers(0, 50), st.integers(0, LARGEST_SEED - 4))),
        spacing=draw(st.sampled_from([None, "leading", "log-snr"])) if objective == "diffusion" else None,
        eta=draw(st.sampled_from([0.0, 0.5])) if sampler == "ddim" else 0.0,
        shift=draw(st.sampled_from([1.0, 3.0])) if objective == "flow" else 1.0,
        guidance_channels=draw(st.sampled_from([ALL_CHANNELS, FIRST_THREE_CHANNELS])),
        guidance_rescale=draw(st.sampled_from([0.0, 0.0, 0.7])),
        block_cache=draw(st.sampled_from([1, 2, 3])) if block_cache else 1,
    )


def crowds(objective: str, block_cache: bool = False) -> st.SearchStrategy[Crowd]:
    arrival = st.builds(
        Arrival,
        after=st.integers(0, 4),
        request=requests(objective, block_cache),
        stays=st.one_of(st.none(), st.none(), st.none(), st.integers(0, 5)),
    )
    return st.builds(Crowd, max_rows=st.integers(4, MAX_ROWS), arrivals=st.lists(arrival, min_size=1, max_size=9))


def run(runner: Runner, crowd: Crowd) -> dict[tuple[str, int], bytes]:
    """(job's place, index) → PNG of whatever was finished; every job that stays ends well."""
    whole, runner.max_rows = runner.max_rows, crowd.max_rows
    engine, joins, leaves = start(runner, {}), dict[int, Jobs](), dict[int, list[str]]()
    tick = 0
    for place, arrival in enumerate(crowd.arrivals):
        tick += arrival.after
        joins.setdefault(tick, {})[str(place)] = arrival.request
        if arrival.stays is not None:
            leaves.setdefault(tick + arrival.stays, []).append(str(place))

    def change(now: int) -> None:
        for name, request in joins.pop(now, {}).items():
            engine.add(name, request, runner.checkpoint.hash)
        for name in leaves.pop(now, []):
            engine.remove(name)

    events, now = [], 0
    while joins or engine.busy:
        change(now)
        events += [(now, event) for event in engine.tick()]
        now += 1
        assert now < 5000, "the crowd does not come to an end"
    runner.max_rows = whole
    stayed = {str(place) for place, arrival in enumerate(crowd.arrivals) if arrival.stays is None}
    told = ends(events)
    assert stayed <= told.keys() and set(told.values()) <= {"done"}
    return images(events)


def assert_each_is_as_alone(runner: Runner, crowd: Crowd, alike: Callable[[bytes, bytes], bool]) -> None:
    arrived = run(runner, crowd)
    for place, arrival in enumerate(crowd.arrivals):
        mine = {index: png for (name, index), png in arrived.items() if name == str(place)}
        by_itself = {index: png for (_, index), png in pictures(runner, {"alone": arrival.request}).items()}
        assert all(alike(png, by_itself[index]) for index, png in mine.items()), f"{arrival.request} differs from itself alone"


def bit_for_bit(one: bytes, other: bytes) -> bool:
    return one == other


def psnr_db(one: bytes, other: bytes) -> float:
    a, b = (np.asarray(Image.open(io.BytesIO(png)), dtype=np.float64) for png in (one, other))
    error = float(np.mean((a - b) ** 2))
    return 10 * np.log10(255**2 / error) if error else np.inf


thorough = settings(
    database=None, deadline=None, derandomize=True, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
each_objective = pytest.mark.parametrize("objective", SAMPLERS)


# --- the property ------------------------------------------------------------------------------------------------------


@each_objective
@pytest.mark.parametrize("name", ["as served", "float32", "block cache"])
def test_every_picture_of_every_crowd_is_bit_for_bit_as_alone(runner_of: Callable[[Mode, str], Runner], name: str, objective: str) -> None:
    assert can_compile(CPU) or not os.environ.get("CI"), "what is served by default is compiled"
    runner = runner_of(modes(CPU)[name], objective)
    assert runner.buckets == [2, 3, 4, 6, 8, 12, 16], "every batch size is tried"

    @thorough
    @given(crowd=crowds(objective, runner.block_cache))
    def holds(crowd: Crowd) -> None:
        assert_each_is_as_alone(runner, crowd, bit_for_bit)

    holds()


@pytest.mark.cuda
@each_objective
@pytest.mark.parametrize("name", ["as served", "reproducible"])
def test_on_cuda_every_picture_is_nearly_as_alone_and_reproducible_bit_for_bit(
    runner_of: Callable[[Mode, str], Runner], name: str, objective: str
) -> None:
    runner = runner_of(modes(CUDA)[name], objective)
    alike = bit_for_bit if name == "reproducible" else lambda one, other: psnr_db(one, other) >= LEAST_PSNR_DB

    @thorough
    @given(crowd=crowds(objective))
    def holds(crowd: Crowd) -> None:
        assert_each_is_as_alone(runner, crowd, alike)

    holds()


@pytest.mark.parametrize("name", ["as served", "float32"])
def test_every_number_of_rows_gives_the_same_picture(
    runner_of: Callable[[Mode, str], Runner], make_request: Callable[..., GenerationRequest], name: str
) -> None:
    """Sixteen jobs of one picture, of which one more joins at every tick."""
    runner = runner_of(modes(CPU)[name], "flow")
    jobs = {str(i): make_request(steps=17 - i, guidance_scale=1.0, class_labels=(LABELS[i % 5],), seed=i) for i in range(16)}
    trace: list[dict[str, Any]] = []
    engine = start(runner, {}, trace.append)

    def join(tick: int) -> None:
        if tick in range(1, 16):
            engine.add(str(tick), jobs[str(tick)], runner.checkpoint.hash)

    engine.add("0", jobs["0"], runner.checkpoint.hash)
    arrived = images(drain(engine, join))
    assert [entry["rows"] for entry in trace if entry["rows"]] == [*range(1, 17), 16], "each tick one more"
    for job, request in jobs.items():
        assert arrived[job, 0] == pictures(runner, {"alone": request})["alone", 0], f"it joined at {int(job) + 1} rows"


@each_objective
def test_a_picture_of_a_job_of_many_is_that_of_a_job_of_one_with_its_seed(
    runner_of: Callable[[Mode, str], Runner], make_request: Callable[..., GenerationRequest], objective: str
) -> None:
    """Their bytes differ only in the request that they carry."""
    runner = runner_of(modes(CPU)["float32"], objective)
    job = make_request(sampler=SAMPLERS[objective][0], class_labels=(0, None, 3, 1, 2), steps=4, seed=40)
    for (_, index), png in pictures(runner, {"many": job}).items():
        one = pictures(runner, {"one": alone(job, index)})["one", 0]
        assert psnr_db(png, one) == np.inf


AGAIN = """
import json, sys, torch, hashlib
from pathlib import Path
torch.set_num_threads(2)
from torch._inductor import config
config.compile_threads = 1
from tests.worker.engines import pictures
from tests.worker.test_same_picture import CPU, mode_found, modes
from worker.protocol import GenerationRequest
folder, name, *requests = sys.argv[1:]
runner = modes(CPU)[name].loader()(Path(folder))
found = pictures(runner, {str(i): GenerationRequest.parse(text) for i, text in enumerate(requests)})
hashes = {f"{job} {index}": hashlib.sha256(png).hexdigest() for (job, index), png in found.items()}
print(json.dumps([mode_found(runner), hashes]))
"""


def mode_found(runner: Runner) -> dict[str, Any]:
    """What a process settled on that decides the bits of a row. The sizes of batches, which are measured, must not."""
    return {"compiled": runner.compiled, "threads": torch.get_num_threads()}


@pytest.mark.parametrize("name", ["as served", "float32"])
def test_a_retry_on_another_process_gives_the_same_bytes(
    runner_of: Callable[[Mode, str], Runner],
    folder_of: Callable[..., Path],
    make_request: Callable[..., GenerationRequest],
    name: str,
) -> None:
    """Here each alone, there together."""
    jobs = [
        make_request(sampler="ddpm", steps=6, class_labels=(0, None, 2), seed=3),
        make_request(sampler="dpm-solver++", steps=4, guidance_scale=4.0, guidance_rescale=0.7, seed=LARGEST_SEED),
    ]
    runner, here = runner_of(modes(CPU)[name], "diffusion"), dict[str, str]()
    for place, request in enumerate(jobs):
        for (_, index), png in pictures(runner, {"x": request}).items():
            here[f"{place} {index}"] = hashlib.sha256(png).hexdigest()
    command = [sys.executable, "-c", AGAIN, str(folder_of("diffusion")), name, *(request.dump() for request in jobs)]
    there = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert there.returncode == 0, there.stderr
    settled, hashes = json.loads(there.stdout.splitlines()[-1])
    assert settled == mode_found(runner), there.stderr
    assert hashes == here and len(here) == 4, there.stderr
