"""What a job asks for, and what a worker tells of a model: JSON in Redis, checked by whoever reads it. Standard library only."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

ALL_CHANNELS, FIRST_THREE_CHANNELS = "all", "first-three"  # of a latent that guidance moves; the official code moves three
MAX_SHIFT = 100.0
MAX_BLOCK_CACHE = 8
LARGEST_IMAGE = 1 << 13  # pixels of a side
LARGEST_SEED = 2**53 - 1  # what a JSON number carries exactly everywhere


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


@dataclass(frozen=True)
class GenerationRequest:
    """A resolved request: nothing in it is left to a default. Picture i has class_labels[i] and seed + i."""

    model: str
    class_labels: tuple[int | None, ...]  # None: unconditional
    guidance_scale: float
    guidance_interval: tuple[float, float]  # of t/T, 0 = clean, both ends in
    steps: int
    sampler: str
    seed: int
    # Since version 2; a payload of version 1 has none of them.
    spacing: str | None = None  # of a diffusion's times; None is the sampler's own, and flow has none
    eta: float = 0.0  # of ddim
    shift: float = 1.0  # of flow time
    guidance_channels: str = ALL_CHANNELS
    guidance_rescale: float = 0.0
    block_cache: int = 1  # all blocks run at every n-th evaluation; 1 is always

    @property
    def num_images(self) -> int:
        return len(self.class_labels)

    def dump(self) -> str:
        """Without `block_cache` where there is none: a worker of a version before it can do the rest."""
        values = asdict(self)
        if self.block_cache == 1:
            del values["block_cache"]
        return json.dumps(values, sort_keys=True)

    @classmethod
    def parse(cls, text: str) -> "GenerationRequest":
        """Raises ValueError on anything that is not such a request; it came through Redis, so it is checked again."""
        try:
            values = json.loads(text)
            low, high = values.pop("guidance_interval")
            request = cls(class_labels=tuple(values.pop("class_labels")), guidance_interval=(low, high), **values)
        except (TypeError, KeyError, AttributeError, ValueError, RecursionError) as error:
            raise ValueError(f"not a generation request: {error}") from error
        request._check()
        return request

    def _check(self) -> None:
        """ValueError unless every field has its type and range: a wrong one must not get as far as the batch of others."""
        low, high = self.guidance_interval
        sound = {
            "model": isinstance(self.model, str),
            "class_labels": 1 <= self.num_images <= 64 and all(y is None or type(y) is int for y in self.class_labels),
            "guidance_scale": _is_number(self.guidance_scale) and 1 <= self.guidance_scale <= 20,
            "guidance_interval": _is_number(low) and _is_number(high) and 0 <= low <= high <= 1,
            "steps": type(self.steps) is int and 1 <= self.steps <= 1000,
            "sampler": isinstance(self.sampler, str),
            "spacing": self.spacing is None or isinstance(self.spacing, str),
            "eta": _is_number(self.eta) and 0 <= self.eta <= 1,
            "shift": _is_number(self.shift) and 0 < self.shift <= MAX_SHIFT,
            "guidance_channels": self.guidance_channels in (ALL_CHANNELS, FIRST_THREE_CHANNELS),
            "guidance_rescale": _is_number(self.guidance_rescale) and 0 <= self.guidance_rescale <= 1,
            "block_cache": type(self.block_cache) is int and 1 <= self.block_cache <= MAX_BLOCK_CACHE,
            "seed": type(self.seed) is int and 0 <= self.seed <= LARGEST_SEED + 1 - self.num_images,
        }
        wrong = [name for name, is_sound in sound.items() if not is_sound]
        if wrong:
            raise ValueError(f"not a generation request: {wrong[0]} is of another type or out of range")


@dataclass(frozen=True)
class ModelRecord:
    """What a worker tells of a model it serves; the API validates requests against it."""

    id: str
    checkpoint: str
    labels: list[list[str]]
    image_size: int
    image_channels: int
    objective: str
    samplers: list[str]
    max_steps: int
    defaults: dict[str, Any]  # steps, guidance_scale, sampler, spacing
    quality: dict[str, dict[str, Any]] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    spacings: list[str] = field(default_factory=list)  # of a diffusion's times; flow has none
    default_spacings: dict[str, str] = field(default_factory=dict)  # by sampler
    device: str = ""
    dtype: str = ""
    max_rows: int = 0
    block_cache: bool = False  # whether requests may ask for one
    rows_per_s: float = 0.0  # that one such worker does with full batches, as it measured at its start; 0 while not resident

    def dump(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def parse(cls, text: str | bytes) -> "ModelRecord":
        """What a newer worker tells besides is left aside, so that an older API goes on reading it.

        Raises ValueError on anything that is no such record; it came through Redis, and requests are resolved by it.
        """
        known = {f.name for f in fields(cls)}
        try:
            values = {name: value for name, value in json.loads(text).items() if name in known}
            json.dumps(values, ensure_ascii=False, allow_nan=False).encode()  # the API tells it all again
            record = cls(**values)
        except (TypeError, AttributeError, ValueError, RecursionError) as error:
            raise ValueError(f"not a model's record: {ascii(error)[:200]}") from error
        record._check()
        return record

    def _check(self) -> None:
        """ValueError unless every field has its type and range."""
        sound = {
            "id": isinstance(self.id, str) and self.id != "",
            "labels": isinstance(self.labels, list) and all(_are_strings(names) and names for names in self.labels),
            "image_size": type(self.image_size) is int and 1 <= self.image_size <= LARGEST_IMAGE,
            "image_channels": type(self.image_channels) is int and self.image_channels in (1, 3),
            "samplers": _are_strings(self.samplers),
            "max_steps": type(self.max_steps) is int and 1 <= self.max_steps <= 1000,
            "defaults": _are_settings(self.defaults) and {"steps", "guidance_scale", "sampler"} <= self.defaults.keys(),
            "quality": isinstance(self.quality, dict) and all(map(_are_settings, self.quality.values())),
            "metrics": isinstance(self.metrics, dict),
            "spacings": _are_strings(self.spacings),
            "default_spacings": isinstance(self.default_spacings, dict) and _are_strings(list(self.default_spacings.values())),
            "max_rows": type(self.max_rows) is int and self.max_rows >= 0,
            "block_cache": type(self.block_cache) is bool,
            "rows_per_s": _is_number(self.rows_per_s) and self.rows_per_s >= 0,
            **{name: isinstance(getattr(self, name), str) for name in ("checkpoint", "objective", "device", "dtype")},
        }
        wrong = [name for name, is_sound in sound.items() if not is_sound]
        if wrong:
            raise ValueError(f"not a model's record: {wrong[0]} is of another type or out of range")


def _are_strings(values: object) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _is_interval(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_number, value)) and 0 <= value[0] <= value[1] <= 1


_SETTINGS: dict[str, Callable[[Any], bool]] = {
    "steps": lambda value: type(value) is int and 1 <= value <= 1000,
    "guidance_scale": lambda value: _is_number(value) and 1 <= value <= 20,
    "guidance_interval": _is_interval,
    "sampler": lambda value: isinstance(value, str),
    "spacing": lambda value: value is None or isinstance(value, str),
    "block_cache": lambda value: type(value) is int and 1 <= value <= MAX_BLOCK_CACHE,
}  # of a model, which a request gets that leaves them out


def _are_settings(values: object) -> bool:
    return isinstance(values, dict) and all(is_sound(values[name]) for name, is_sound in _SETTINGS.items() if name in values)
