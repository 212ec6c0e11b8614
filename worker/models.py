"""The checkpoints that a worker may run: `Shelf`, those of a registry as far as they fit the memory; `OneModel`, one that is always there.

Loading a checkpoint takes seconds to minutes, so it happens in a thread beside the engine, which takes the runner between two ticks.
"""

import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from model.checkpoint import CheckpointConfig, CheckpointError, read_config, resolve
from model.registry import find, models, signature
from worker.protocol import ModelRecord
from worker.runner import Runner

log = logging.getLogger("dit.models")

LOOK_EVERY_S = 2.0  # for new versions
_ROOM_EVERY_S = 0.1  # that a checkpoint which finds no room looks for some
_FORGET_FAILURE_S = 30.0  # after which a job may ask again for a version that could not be loaded
_FORGET_OLD_S = 60.0  # after which a version that is no longer served, and that no job needed meanwhile, gives its memory back
_RETRY_LATEST_S = 300.0  # after which the latest version is tried again by itself: memory may have come free

Load = Callable[[Path], Runner]
Describe = Callable[[str, CheckpointConfig, str, Runner | None], ModelRecord]  # model, its configuration, hash, runner if resident


class OneModel:
    """One checkpoint that is always there, and never another: for tests and benchmarks."""

    crowded = False

    def __init__(self, runner: Runner, record: ModelRecord) -> None:
        self._runner, self._record = runner, record

    def records(self) -> list[ModelRecord]:
        return [self._record]

    def runner(self, model: str, checkpoint: str) -> Runner:
        here = self._record
        if (model, checkpoint) != (here.id, here.checkpoint):
            raise ValueError(f"checkpoint {checkpoint[:12]} of {model} is not here, only {here.checkpoint[:12]} of {here.id}")
        return self._runner

    def poll(self, busy: set[str]) -> None:
        """Nothing ever changes."""


@dataclass(frozen=True)
class _Version:
    """What is known of a checkpoint whose every byte was looked at."""

    config: CheckpointConfig
    hash: str


@dataclass(frozen=True)
class _Resident:
    runner: Runner
    size_bytes: int


@dataclass(frozen=True)
class _Loading:
    """A checkpoint on its way into memory."""

    model: str
    hash: str
    future: "Future[_Resident]"


class Shelf:
    """The models of a registry. Resident ones stay until another needs their memory, the least recently used out first; old versions go.

    The model's record names a version only once it was verified, and where the version before is resident, once it is resident too.
    """

    def __init__(self, registry: Path, names: list[str] | None, load: Load, describe: Describe, *, budget_bytes: int) -> None:
        """Loads what fits, before it returns. `names`: the models to serve, None for all that the registry has, now or later.

        CheckpointError if a model is not there, or none can be loaded.
        """
        self.registry, self.names, self.budget_bytes = registry, names, budget_bytes
        self.crowded = False  # what is wanted finds no room until jobs have ended
        self._load, self._describe = load, describe
        self._served: dict[str, _Version] = {}  # model → the version that its record names
        self._latest: dict[str, _Version] = {}  # model → what the registry has: another one while it is being loaded, or if that failed
        self._signatures: dict[str, str] = {}
        self._resident: OrderedDict[str, _Resident] = OrderedDict()
        self._needed_at: dict[str, float] = {}  # of those that are resident
        self._wanted: dict[str, str] = {}  # hash → model
        self._reading: dict[str, Future[tuple[CheckpointConfig, str]]] = {}  # model → its latest version, every byte of it
        self._loading: _Loading | None = None
        self._failed: dict[str, tuple[float, str]] = {}  # hash → when, why
        self._look_at, self._begin_at = time.monotonic() + LOOK_EVERY_S, -math.inf
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        self._load_first()

    # What the engine asks.

    def records(self) -> list[ModelRecord]:
        return [self._record(model, version) for model, version in sorted(self._served.items())]

    def _record(self, model: str, version: _Version) -> ModelRecord:
        resident = self._resident.get(version.hash)
        return self._describe(model, version.config, version.hash, resident.runner if resident else None)

    def runner(self, model: str, checkpoint: str) -> Runner | None:
        """The runner of a checkpoint, None while it is being loaded. ValueError if there is none, or it could not be loaded."""
        resident = self._resident.get(checkpoint)
        if resident:
            self._resident.move_to_end(checkpoint)
            return resident.runner
        when, why = self._failed.get(checkpoint, (0.0, ""))
        if why and time.monotonic() - when < _FORGET_FAILURE_S:
            raise ValueError(why)
        if checkpoint not in self._wanted:
            if model not in self._served or find(self.registry / model, checkpoint) is None:
                raise ValueError(f"checkpoint {checkpoint[:12]} of model {model} is not in this worker's registry (any more); submit again")
            self._wanted[checkpoint] = model
        return None

    def poll(self, busy: set[str]) -> None:
        """Between two ticks: take in what was loaded, look for new versions, begin to load what is wanted. Costs nothing as a rule."""
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + LOOK_EVERY_S
            self._look()
            self._forget_old(busy, now)
        for model in [model for model, read in self._reading.items() if read.done()]:
            self._take_note(model, self._reading.pop(model))
        if self._loading and self._loading.future.done():
            loading, self._loading = self._loading, None
            self._take_in(loading)
        if self._wanted and not self._loading and now >= self._begin_at:
            self._begin_at = now + _ROOM_EVERY_S
            self._begin(busy)

    # At the start.

    def _entries(self) -> dict[str, Path]:
        there = models(self.registry)
        return there if self.names is None else {name: there[name] for name in self.names if name in there}

    def _load_first(self) -> None:
        entries = self._entries()
        missing = [name for name in self.names or () if name not in entries]
        if missing or not entries:
            asked = f"no model {missing[0]!r}" if missing else "no model"
            raise CheckpointError(f"{asked} in {self.registry.resolve()}, which has: {', '.join(models(self.registry)) or 'none'}")
        problems: list[str] = []
        for name, entry in entries.items():
            try:
                self._signatures[name] = signature(entry)
                self._served[name] = self._latest[name] = self._read_first(entry)
            except (ValueError, OSError) as error:
                log.error("model %s cannot be served: %s", name, error)
                problems.append(str(error))
        if not self._served:
            raise CheckpointError(problems[0])

    def _read_first(self, entry: Path) -> _Version:
        """The latest version, resident if there is room. The first one always is: it settles what the device and the process can do."""
        folder = resolve(entry)
        version, need = _Version(*read_config(folder)), _stored_bytes(folder)
        if version.hash not in self._resident and (self._has_room(need) or not self._resident):
            self._resident[version.hash] = self._loaded(folder, version.hash)
        return version

    # New versions.

    def _look(self) -> None:
        for name, entry in self._entries().items():
            try:
                token = signature(entry)
            except (ValueError, OSError) as error:  # of one folder, which the next look sees again
                log.warning("model %s cannot be looked at: %s", name, error)
                continue
            if token != self._signatures.get(name) and name not in self._reading:
                self._signatures[name] = token
                self._reading[name] = self._thread.submit(read_config, entry)
        for name, version in self._latest.items():
            when, _ = self._failed.get(version.hash, (math.inf, ""))
            if version != self._served.get(name) and time.monotonic() - when >= _RETRY_LATEST_S:
                self._wanted.setdefault(version.hash, name)

    def _take_note(self, name: str, read: "Future[tuple[CheckpointConfig, str]]") -> None:
        """A version that was published since is loaded first where the one before is resident, or there is room."""
        try:
            version = _Version(*read.result())
        except (CheckpointError, OSError) as error:
            log.error("the new version of %s is refused, and the old one stays: %s", name, error)
            return
        before, folder = self._served.get(name), find(self.registry / name, version.hash)
        if folder is None:
            return  # replaced again meanwhile, which the next look sees
        self._latest[name] = version
        worth_loading = before.hash in self._resident if before else self._has_room(_stored_bytes(folder))
        if worth_loading and version.hash not in self._resident:
            log.info("model %s has a new version, %s; loading it", name, version.hash[:12])
            self._wanted.setdefault(version.hash, name)
        else:
            self._serve(name, version)

    def _serve(self, name: str, version: _Version) -> None:
        if self._served.get(name) != version:
            log.info("model %s: version %s takes over", name, version.hash[:12])
        self._served[name] = version

    def _forget_old(self, busy: set[str], now: float) -> None:
        """With each version that is published a worker would else grow, by more than its weights: buffers and graphs come with them."""
        needed = {*busy, *self._wanted, *(version.hash for version in (*self._served.values(), *self._latest.values()))}
        self._needed_at = {name: now if name in needed else self._needed_at.get(name, now) for name in self._resident}
        for checkpoint, at in self._needed_at.items():
            if now - at > _FORGET_OLD_S:
                log.info("checkpoint %s is no longer served, and no job needs it; it goes", checkpoint[:12])
                del self._resident[checkpoint]

    # Loading.

    def _begin(self, busy: set[str]) -> None:
        """Load the first that is wanted, if there is room or can be made."""
        checkpoint, model = next(iter(self._wanted.items()))
        folder = find(self.registry / model, checkpoint)
        if folder is None:
            self._give_up(checkpoint, model, f"checkpoint {checkpoint[:12]} of model {model} was removed from the registry")
            return
        self.crowded = not self._make_room(_stored_bytes(folder), busy)
        if not self.crowded:
            self._loading = _Loading(model, checkpoint, self._thread.submit(self._loaded, folder, checkpoint))

    def _make_room(self, need: int, busy: set[str]) -> bool:
        """Forget what no job runs on, the least recently used first, if that is enough. One that is too large may try, beside no other."""
        staying = sum(resident.size_bytes for checkpoint, resident in self._resident.items() if checkpoint in busy)
        if staying and staying + need > self.budget_bytes:
            return False
        for old in [checkpoint for checkpoint in self._resident if checkpoint not in busy]:
            if self._has_room(need):
                break
            log.info("checkpoint %s makes room", old[:12])
            del self._resident[old]
        return True

    def _loaded(self, folder: Path, checkpoint: str) -> _Resident:
        runner = self._load(folder)
        if runner.checkpoint.hash != checkpoint:
            raise CheckpointError(f"{folder} was replaced while it was loaded; it is {runner.checkpoint.hash[:12]} now")
        return _Resident(runner, _stored_bytes(folder))

    def _take_in(self, loading: _Loading) -> None:
        """A version that cannot be loaded is refused, and the one before stays."""
        error = loading.future.exception()
        if error is not None:
            if not isinstance(error, ValueError | OSError | RuntimeError):
                raise error
            self._give_up(loading.hash, loading.model, f"checkpoint {loading.hash[:12]} could not be loaded: {error}")
            return
        del self._wanted[loading.hash]
        self._resident[loading.hash] = loading.future.result()
        for name, version in self._latest.items():
            if version.hash == loading.hash:
                self._serve(name, version)

    def _give_up(self, checkpoint: str, model: str, why: str) -> None:
        log.error("model %s: %s", model, why)
        self.crowded = False
        del self._wanted[checkpoint]
        self._failed[checkpoint] = (time.monotonic(), why)

    def _has_room(self, need: int) -> bool:
        return sum(resident.size_bytes for resident in self._resident.values()) + need <= self.budget_bytes


def _stored_bytes(folder: Path) -> int:
    """What the weights take, about; nothing for a folder that was removed a moment ago, which loading it will find out."""
    try:
        return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    except FileNotFoundError:
        return 0
