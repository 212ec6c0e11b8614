"""The models of a registry on one device: what fits is resident, the rest waits its turn, versions come and go under running jobs."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from model.checkpoint import CheckpointConfig, CheckpointError, annotate
from model.registry import publish, remove, roll_back
from tests.worker.engines import drain, ends, images
from worker import models as models_module
from worker.engine import Engine
from worker.load import Loader
from worker.models import OneModel, Shelf
from worker.protocol import GenerationRequest, ModelRecord
from worker.runner import Runner
from worker.serve import describe

CPU = torch.device("cpu")
MakeRequest = Callable[..., GenerationRequest]


class Place:
    """A registry of tiny models, and shelves that serve it."""

    def __init__(self, folder: Path, make_checkpoint: Callable[..., Path]) -> None:
        self.registry, self._sources, self._make = folder / "registry", folder / "sources", make_checkpoint
        self.loader = Loader(CPU, torch.float32, max_rows=4, compile=False)
        self.loaded: list[str] = []  # folders, in the order they were loaded
        self.size_bytes = sum(path.stat().st_size for path in self.source(0).glob("*.safetensors"))

    def source(self, seed: int) -> Path:
        """A checkpoint outside the registry."""
        folder = self._sources / f"seed-{seed}"
        return folder if folder.exists() else self._make(self._sources, name=folder.name, seed=seed)

    def publish(self, model: str, seed: int) -> str:
        return publish(self.registry, model, self.source(seed))

    def shelf(self, names: list[str] | None = None, room_for: float = 10) -> Shelf:
        return Shelf(self.registry, names, self.load, self.describe, budget_bytes=int(room_for * self.size_bytes))

    def load(self, folder: Path) -> Runner:
        self.loaded.append(str(folder.relative_to(self.registry)))
        return self.loader(folder)

    def describe(self, model: str, config: CheckpointConfig, checkpoint: str, runner: Runner | None) -> ModelRecord:
        return describe(model, config, checkpoint, runner, self.loader)


@pytest.fixture
def place(tmp_path: Path, make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Place:
    """Shelves look for new versions at every poll."""
    monkeypatch.setattr(models_module, "LOOK_EVERY_S", 0.0)
    monkeypatch.setattr(models_module, "_ROOM_EVERY_S", 0.0)
    return Place(tmp_path, make_checkpoint)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """A shelf's first runner settles how many threads the process has."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def poll_until(shelf: Shelf, condition: Callable[[], object], busy: set[str] | None = None) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        shelf.poll(busy or set())
        time.sleep(0.002)


def settle(shelf: Shelf, busy: set[str] | None = None) -> None:
    """Poll until nothing is read or loaded any more."""
    shelf.poll(busy or set())
    poll_until(shelf, lambda: not shelf._reading and not shelf._loading and (not shelf._wanted or shelf.crowded), busy)


def told(shelf: Shelf) -> dict[str, str]:
    return {record.id: record.checkpoint for record in shelf.records()}


def resident(shelf: Shelf) -> dict[str, bool]:
    """By the records, as the API sees it."""
    return {record.id: record.max_rows > 0 for record in shelf.records()}


# --- the start ---------------------------------------------------------------------------------------------------------


def test_every_model_of_the_registry_is_served(place: Place) -> None:
    hashes = {name: place.publish(name, seed) for seed, name in enumerate(("b", "a", "c"))}
    shelf = place.shelf()
    assert told(shelf) == hashes and [record.id for record in shelf.records()] == ["a", "b", "c"]
    for name, identity in hashes.items():
        runner = shelf.runner(name, identity)
        assert runner is not None and runner.checkpoint.hash == identity
    record = shelf.records()[0]
    assert (record.max_rows, record.device, record.dtype, record.samplers) == (4, "cpu", "float32", ["euler", "heun", "ab2"])


def test_a_model_that_is_a_checkpoint_folder_itself_is_served(place: Place, make_checkpoint: Callable[..., Path]) -> None:
    make_checkpoint(place.registry, name="plain", seed=3)
    shelf = place.shelf()
    (record,) = shelf.records()
    assert record.id == "plain" and shelf.runner("plain", record.checkpoint) is not None


def test_only_the_models_that_were_named_are_served(place: Place) -> None:
    for seed, name in enumerate("abc"):
        place.publish(name, seed)
    shelf = place.shelf(["c", "a"])
    assert [*told(shelf)] == ["a", "c"] and len(place.loaded) == 2
    with pytest.raises(CheckpointError, match=r"no model 'd' in .*registry, which has: a, b, c$"):
        place.shelf(["a", "d"])


def test_a_registry_without_models_is_refused(place: Place) -> None:
    with pytest.raises(CheckpointError, match=r"no model in .*registry, which has: none$"):
        place.shelf()


def test_a_broken_model_is_left_out_and_the_others_are_served(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    broken, sound = place.publish("a", 1), place.publish("b", 2)
    flip_a_byte(place.registry / "a" / broken[:12])
    shelf = place.shelf()
    assert told(shelf) == {"b": sound} and "model a cannot be served" in caplog.text and "sha256 does not fit" in caplog.text
    with pytest.raises(ValueError, match="is not in this worker's registry"):
        shelf.runner("a", broken)
    flip_a_byte(place.registry / "b" / sound[:12])
    with pytest.raises(CheckpointError, match="sha256 does not fit"):
        place.shelf()


def flip_a_byte(folder: Path) -> None:
    """The time stays as it was, as when a disk rots."""
    path = folder / "dit.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_two_names_of_one_checkpoint_share_its_memory(place: Place) -> None:
    identity = place.publish("a", 1)
    assert place.publish("b", 1) == identity
    shelf = place.shelf()
    assert told(shelf) == {"a": identity, "b": identity} and len(place.loaded) == 1
    assert shelf.runner("a", identity) is shelf.runner("b", identity)


def test_a_model_larger_than_the_memory_that_is_left_is_resident_if_nothing_else_is(place: Place) -> None:
    place.publish("a", 1)
    shelf = place.shelf(room_for=0.5)
    assert resident(shelf) == {"a": True}


# --- memory ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def three(place: Place) -> tuple[Shelf, dict[str, str]]:
    """Models a, b and c with room for two of them: a and b are resident."""
    hashes = {name: place.publish(name, seed) for seed, name in enumerate("abc")}
    return place.shelf(room_for=2.5), hashes


def test_what_does_not_fit_is_served_too_but_not_resident(three: tuple[Shelf, dict[str, str]]) -> None:
    shelf, hashes = three
    assert told(shelf) == hashes and resident(shelf) == {"a": True, "b": True, "c": False}


@pytest.mark.parametrize(("used", "left"), [("a", {"a": True, "b": False, "c": True}), ("b", {"a": False, "b": True, "c": True})])
def test_the_least_recently_used_one_makes_room(three: tuple[Shelf, dict[str, str]], used: str, left: dict[str, bool]) -> None:
    shelf, hashes = three
    shelf.runner(used, hashes[used])
    assert shelf.runner("c", hashes["c"]) is None, "it is being loaded"
    poll_until(shelf, lambda: shelf.runner("c", hashes["c"]))
    assert resident(shelf) == left and not shelf.crowded
    assert shelf.runner("c", hashes["c"]).checkpoint.hash == hashes["c"]


def test_a_busy_checkpoint_never_makes_room(three: tuple[Shelf, dict[str, str]]) -> None:
    shelf, hashes = three
    shelf.runner("c", hashes["c"])
    poll_until(shelf, lambda: shelf.runner("c", hashes["c"]), busy={hashes["a"], hashes["c"]})
    assert resident(shelf) == {"a": True, "b": False, "c": True}, "though a was used before b"


def test_a_checkpoint_without_room_waits_until_jobs_have_ended_and_nothing_is_given_up_in_vain(
    place: Place, three: tuple[Shelf, dict[str, str]]
) -> None:
    shelf, hashes = three
    busy = {hashes["a"], hashes["b"], hashes["c"]}
    assert shelf.runner("c", hashes["c"]) is None
    for _ in range(5):
        shelf.poll(busy)
        assert shelf.crowded and shelf.runner("c", hashes["c"]) is None
    assert resident(shelf) == {"a": True, "b": True, "c": False} and len(place.loaded) == 2
    poll_until(shelf, lambda: shelf.runner("c", hashes["c"]), busy - {hashes["b"]})
    assert resident(shelf) == {"a": True, "b": False, "c": True} and not shelf.crowded


def test_an_idle_checkpoint_stays_where_its_memory_would_not_be_enough(place: Place, make_checkpoint: Callable[..., Path]) -> None:
    small = {name: place.publish(name, seed) for seed, name in enumerate("ab")}
    make_checkpoint(place.registry, name="large", depth=6, hidden_size=64)
    shelf = place.shelf(room_for=2.5)
    large = told(shelf)["large"]
    assert shelf.runner("large", large) is None
    shelf.poll({small["a"], large})
    assert shelf.crowded and resident(shelf) == {"a": True, "b": True, "large": False}
    poll_until(shelf, lambda: shelf.runner("large", large))
    assert resident(shelf) == {"a": False, "b": False, "large": True}, "beside nothing else it may try"


def test_a_model_whose_memory_is_taken_gets_its_turn_under_constant_load(place: Place, make_request: MakeRequest) -> None:
    hashes = {name: place.publish(name, seed) for seed, name in enumerate("ab")}
    shelf = place.shelf(room_for=1.5)
    engine, count = Engine(shelf), 0
    engine.add("b", make_request(model="b"), hashes["b"])

    def more_of_a(tick: int) -> None:
        nonlocal count
        while engine.wants("a") and count < 1000 and "b" in engine.jobs:
            engine.add(f"a {count}", make_request(model="a", steps=2), hashes["a"])
            count += 1

    events = drain(engine, more_of_a, at_most=3000)
    assert ends(events)["b"] == "done" and set(ends(events).values()) == {"done"} and 1 <= count < 1000


# --- versions ----------------------------------------------------------------------------------------------------------


def test_a_job_pinned_to_an_older_version_loads_it_and_runs_on_it(place: Place, make_request: MakeRequest) -> None:
    old, new = place.publish("a", 1), place.publish("a", 2)
    shelf = place.shelf()
    assert told(shelf) == {"a": new} and len(place.loaded) == 1
    engine = Engine(shelf)
    engine.add("pinned", make_request(model="a"), old)
    engine.add("newest", make_request(model="a"), new)
    arrived = images(drain(engine))
    assert told(shelf) == {"a": new}
    for name, seed in (("pinned", 1), ("newest", 2)):
        assert arrived[name, 0] == served_alone(place, seed, make_request(model="a"))
    assert arrived["pinned", 0] != arrived["newest", 0]


def served_alone(place: Place, seed: int, request: GenerationRequest) -> bytes:
    """The picture of a checkpoint outside the registry, on a runner of its own."""
    runner = place.loader(place.source(seed))
    record = ModelRecord(request.model, runner.checkpoint.hash, [], 16, 1, "flow", [], 1000, {})
    engine = Engine(OneModel(runner, record))
    engine.add("x", request, record.checkpoint)
    return images(drain(engine))["x", 0]


def test_a_new_version_takes_over_while_jobs_run_on_the_old_one(place: Place, make_request: MakeRequest) -> None:
    old = place.publish("a", 1)
    shelf = place.shelf()
    engine, early, both = Engine(shelf), [make_request(model="a", steps=100)], list[bool]()
    engine.add("early 0", early[0], old)
    engine.tick()
    new = place.publish("a", 2)

    def join(tick: int) -> None:
        if not both and engine.progress(f"early {len(early) - 1}") > 0.5:  # one of them always runs
            early.append(make_request(model="a", steps=100, seed=1000 * len(early)))
            engine.add(f"early {len(early) - 1}", early[-1], old)
        if not both and told(shelf) == {"a": new}:
            assert engine.wants("a")
            engine.add("late", make_request(model="a"), new)
            both.append({old, new} <= {entry.checkpoint for entry in engine.jobs.values()})

    events = drain(engine, join, at_most=100_000)
    assert both == [True] and set(ends(events).values()) == {"done"}
    arrived = images(events)
    assert arrived["late", 0] == served_alone(place, 2, make_request(model="a"))
    for number in (0, len(early) - 1):
        assert arrived[f"early {number}", 0] == served_alone(place, 1, early[number])


def test_a_broken_new_version_is_refused_and_the_old_one_stays(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    old = place.publish("a", 1)
    shelf = place.shelf()
    new = place.publish("a", 2)
    flip_a_byte(place.registry / "a" / new[:12])
    settle(shelf)
    assert told(shelf) == {"a": old} and resident(shelf) == {"a": True} and shelf.runner("a", old) is not None
    assert "the new version of a is refused, and the old one stays" in caplog.text and "sha256 does not fit" in caplog.text
    newest = place.publish("a", 3)
    settle(shelf)
    assert told(shelf) == {"a": newest}, "a sound one after it is taken"


def test_a_new_version_that_cannot_be_loaded_is_refused_and_the_old_one_stays(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    old = place.publish("a", 1)
    shelf = place.shelf()

    def full(folder: Path) -> Runner:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(shelf, "_load", full)
    new = place.publish("a", 2)
    settle(shelf)
    assert told(shelf) == {"a": old} and shelf.runner("a", old) is not None
    assert f"checkpoint {new[:12]} could not be loaded: CUDA out of memory." in caplog.text
    with pytest.raises(ValueError, match="could not be loaded: CUDA out of memory"):
        shelf.runner("a", new)
    monkeypatch.setattr(shelf, "_load", place.load)
    other = place.publish("b", 3)
    settle(shelf)
    assert told(shelf) == {"a": old, "b": other}, "nor does it when another is loaded"
    monkeypatch.setattr(models_module, "_FORGET_FAILURE_S", 0.0)
    assert shelf.runner("a", new) is None, "after a while it may be tried again"
    poll_until(shelf, lambda: shelf.runner("a", new))
    assert told(shelf) == {"a": new, "b": other}


def test_a_latest_version_that_could_not_be_loaded_is_tried_again_by_itself(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    old = place.publish("a", 1)
    shelf = place.shelf()

    def full(folder: Path) -> Runner:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(shelf, "_load", full)
    new = place.publish("a", 2)
    settle(shelf)
    monkeypatch.setattr(shelf, "_load", place.load)
    settle(shelf)
    assert told(shelf) == {"a": old}, "not at once: each try takes time from those who step"
    monkeypatch.setattr(models_module, "_RETRY_LATEST_S", 0.0)
    poll_until(shelf, lambda: told(shelf) == {"a": new})


def test_a_version_that_is_not_there_fails_its_job_with_a_clear_message(place: Place, make_request: MakeRequest) -> None:
    place.publish("a", 1)
    engine = Engine(place.shelf())
    with pytest.raises(ValueError, match=r"checkpoint cdcdcdcdcdcd of model a is not in this worker's registry \(any more\); submit again"):
        engine.add("x", make_request(model="a"), "cd" * 32)
    with pytest.raises(ValueError, match="of model other is not in this worker's registry"):
        engine.add("x", make_request(model="other"), "cd" * 32)
    assert not engine.busy


def test_a_version_that_is_removed_before_it_is_loaded_fails_its_job_with_a_clear_message(place: Place, make_request: MakeRequest) -> None:
    old, new = place.publish("a", 1), place.publish("a", 2)
    engine = Engine(place.shelf())
    engine.add("x", make_request(model="a"), old)
    engine.add("y", make_request(model="a"), new)
    remove(place.registry / "a", old[:12])
    assert ends(drain(engine)) == {"x": f"checkpoint {old[:12]} of model a was removed from the registry", "y": "done"}


def test_a_folder_that_is_replaced_while_it_is_loaded_is_not_taken_for_what_it_was(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = place.publish("a", 1), place.publish("a", 2)
    shelf = place.shelf()
    monkeypatch.setattr(shelf, "_load", lambda folder: place.loader(place.source(3)))
    assert shelf.runner("a", first) is None
    settle(shelf)
    with pytest.raises(ValueError, match=f"{first[:12]} could not be loaded: .* was replaced while it was loaded"):
        shelf.runner("a", first)
    assert told(shelf) == {"a": second}


def test_a_roll_back_takes_over_at_once_where_the_older_version_is_resident(place: Place) -> None:
    old = place.publish("a", 1)
    shelf = place.shelf()
    new = place.publish("a", 2)
    settle(shelf)
    assert told(shelf) == {"a": new}
    roll_back(place.registry / "a", old)
    settle(shelf)
    assert told(shelf) == {"a": old} and len(place.loaded) == 2


def test_an_old_version_goes_when_no_job_has_needed_it_for_a_while(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    old = place.publish("a", 1)
    other = place.publish("b", 2)
    shelf = place.shelf()
    new = place.publish("a", 3)
    settle(shelf, busy={old})
    assert told(shelf) == {"a": new, "b": other} and set(shelf._resident) == {old, new, other}
    settle(shelf)  # needed a moment ago
    assert old in shelf._resident
    monkeypatch.setattr(models_module, "_FORGET_OLD_S", 0.0)
    settle(shelf, busy={old})
    assert old in shelf._resident
    poll_until(shelf, lambda: old not in shelf._resident)
    assert set(shelf._resident) == {new, other}
    monkeypatch.undo()
    assert shelf.runner("a", old) is None  # a job that was pinned to it loads it again
    poll_until(shelf, lambda: shelf.runner("a", old) is not None)


def test_a_version_that_was_rolled_back_while_it_was_loaded_does_not_take_over(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    old = place.publish("a", 1)
    shelf = place.shelf()
    gate, started = threading.Event(), threading.Event()

    def slow(folder: Path) -> Runner:
        started.set()
        assert gate.wait(60)
        return place.load(folder)

    monkeypatch.setattr(shelf, "_load", slow)
    place.publish("a", 2)
    poll_until(shelf, started.is_set)
    roll_back(place.registry / "a", old)
    shelf.poll(set())
    gate.set()
    settle(shelf)
    assert told(shelf) == {"a": old}


def test_a_version_that_a_job_was_pinned_to_before_it_was_seen_takes_over_all_the_same(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another worker told of it first."""
    place.publish("a", 1)
    shelf = place.shelf()
    new = place.publish("a", 2)
    monkeypatch.setattr(shelf, "_look", lambda: None)
    assert shelf.runner("a", new) is None
    shelf.poll(set())
    assert shelf._loading is not None
    monkeypatch.undo()
    monkeypatch.setattr(models_module, "LOOK_EVERY_S", 0.0)
    settle(shelf)
    shelf._look_at = 0.0
    poll_until(shelf, lambda: told(shelf) == {"a": new})
    assert len(place.loaded) == 2


def test_new_defaults_of_the_same_checkpoint_are_told_without_loading_it_again(place: Place) -> None:
    identity = place.publish("a", 1)
    shelf = place.shelf()
    runner = shelf.runner("a", identity)
    annotate(place.registry / "a" / identity[:12], card="# Tiny\n", files={}, default_steps=9)
    poll_until(shelf, lambda: shelf.records()[0].defaults["steps"] == 9)
    assert told(shelf) == {"a": identity} and shelf.runner("a", identity) is runner and len(place.loaded) == 1


def test_a_new_version_of_a_model_that_is_not_resident_is_told_without_loading_it(
    place: Place, three: tuple[Shelf, dict[str, str]]
) -> None:
    shelf, hashes = three
    new = place.publish("c", 9)
    settle(shelf)
    assert told(shelf) == {**hashes, "c": new} and resident(shelf)["c"] is False and len(place.loaded) == 2
    broken = place.publish("c", 10)
    flip_a_byte(place.registry / "c" / broken[:12])
    settle(shelf)
    assert told(shelf)["c"] == new, "nor is it told unread"


@pytest.mark.parametrize("room_for", [10, 1.5])
def test_a_model_published_later_is_served_where_none_were_named(place: Place, room_for: float) -> None:
    first = place.publish("a", 1)
    all_models, named = place.shelf(room_for=room_for), place.shelf(["a"])
    later = place.publish("b", 2)
    for shelf in (all_models, named):
        settle(shelf)
    assert told(all_models) == {"a": first, "b": later} and told(named) == {"a": first}
    assert resident(all_models) == {"a": True, "b": room_for == 10}, "nobody has asked for it, so nothing makes room"


def test_the_bytes_of_a_new_version_are_read_beside_the_loop(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large one takes seconds to hash, in which leases must be renewed and pictures step."""
    place.publish("a", 1)
    shelf = place.shelf()
    readers: list[str] = []
    read_config = models_module.read_config

    def watched(entry: Path) -> tuple[CheckpointConfig, str]:
        readers.append(threading.current_thread().name)
        return read_config(entry)

    monkeypatch.setattr(models_module, "read_config", watched)
    new = place.publish("a", 2)
    settle(shelf)
    assert told(shelf) == {"a": new} and readers == ["loader_0"]


def test_a_loader_that_breaks_in_a_way_nobody_thought_of_is_not_hidden(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    old = place.publish("a", 1)
    place.publish("a", 2)
    shelf = place.shelf()

    def broken(folder: Path) -> Runner:
        raise TypeError("a bug")

    monkeypatch.setattr(shelf, "_load", broken)
    shelf.runner("a", old)
    with pytest.raises(TypeError, match="a bug"):
        settle(shelf)
