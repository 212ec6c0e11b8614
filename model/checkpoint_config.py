"""What `checkpoint.json` says besides its files."""

from dataclasses import dataclass, field
from typing import Any

from model.config import LARGEST_IMAGE, DiTConfig, ObjectiveConfig, VAEConfig
from model.samplers import available_samplers, available_spacings, max_steps, own_spacing

_MOST_GUIDANCE = 20  # of a default scale: what a request may ask for


@dataclass(frozen=True)
class CheckpointConfig:
    """Checked when it is built, whether by code or from a file: ValueError with what is wrong and what is allowed."""

    architecture: DiTConfig
    objective: ObjectiveConfig
    image_size: int
    image_channels: int
    labels: tuple[tuple[str, ...], ...]  # per class, every name it answers to
    default_steps: int
    default_guidance_scale: float
    default_sampler: str
    default_spacing: str | None = None  # of a diffusion's times with the default sampler; None is that sampler's own
    default_guidance_interval: tuple[float, float] | None = None  # of t/T, with the default guidance scale; None is all of it
    vae: VAEConfig | None = None
    quality: dict[str, dict[str, Any]] = field(default_factory=dict)  # draft, standard, best → steps, sampler, guidance_scale, …
    tuning: dict[str, Any] = field(default_factory=dict)  # what `dit tune` measured, and how
    provenance: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check_kinds()
        if len(self.labels) != self.architecture.num_classes:
            raise ValueError(f"{len(self.labels)} labels for {self.architecture.num_classes} classes")
        names = [name for group in self.labels for name in group]
        if not all(self.labels) or not all(names):
            raise ValueError("every class needs at least one name that is not empty")
        if self.vae and self.vae.latent_size != self.architecture.input_size:
            raise ValueError(f"the VAE's latents are {self.vae.latent_size} wide, the DiT takes {self.architecture.input_size}")
        if self.vae and self.vae.latent_channels != self.architecture.in_channels:
            raise ValueError(f"the VAE's latents have {self.vae.latent_channels} channels, the DiT takes {self.architecture.in_channels}")
        if self.vae and (self.vae.image_size, self.vae.image_channels) != (self.image_size, self.image_channels):
            made = f"{self.vae.image_size} pixels and {self.vae.image_channels} channels"
            raise ValueError(f"the VAE makes {made}, but image_size is {self.image_size} and image_channels {self.image_channels}")
        self._check_settings("the default", self.defaults)
        for name, settings in self.quality.items():
            self._check_settings(f"quality {name!a}:", settings)

    def _check_kinds(self) -> None:
        """Of what is not a configuration with checks of its own: it may come from a file."""
        sound = {
            "image_size": type(self.image_size) is int and 1 <= self.image_size <= LARGEST_IMAGE,
            "image_channels": type(self.image_channels) is int and self.image_channels in (1, 3),
            "labels": all(isinstance(name, str) for group in self.labels for name in group),
            "quality": isinstance(self.quality, dict) and all(isinstance(entry, dict) for entry in self.quality.values()),
            **{name: isinstance(getattr(self, name), dict) for name in ("tuning", "provenance", "metrics")},
        }
        for name, is_sound in sound.items():
            if not is_sound:
                raise ValueError(f"{name} is of another type or out of range")

    def _check_settings(self, of: str, settings: dict[str, Any]) -> None:
        """What a request that leaves them out will get, as far as it is there."""
        given, most = {**self.defaults, **settings}, max_steps(self.objective)
        samplers, spacings = available_samplers(self.objective, self.architecture.learn_sigma), available_spacings(self.objective)
        interval = given.get("guidance_interval", [0, 1])
        allowed = {
            "sampler": (given["sampler"] in samplers, f"one of this model's: {', '.join(samplers)}"),
            "steps": (type(given["steps"]) is int and 1 <= given["steps"] <= most, f"between 1 and {most}"),
            "guidance_scale": (_is_between(1, given["guidance_scale"], _MOST_GUIDANCE), f"between 1 and {_MOST_GUIDANCE}"),
            "guidance_interval": (is_interval(interval), "[low, high] with 0 ≤ low ≤ high ≤ 1"),
            "spacing": (given.get("spacing") in (None, *spacings), f"one of this model's: {', '.join(spacings) or 'none'}"),
            "block_cache": (type(given.get("block_cache", 1)) is int and given.get("block_cache", 1) >= 1, "at least 1"),
        }
        for name, (is_sound, words) in allowed.items():
            if not is_sound:
                raise ValueError(f"{of} {name} must be {words}; got {ascii(given[name])[:60]}")

    def spacing_of(self, sampler: str) -> str | None:
        """The spacing of a request that names none; None for flow."""
        given = self.default_spacing if sampler == self.default_sampler else None
        return given or own_spacing(self.objective, sampler)

    def guidance_interval_of(self, guidance_scale: float) -> tuple[float, float]:
        """The interval of a request that names none: the default one was chosen together with its scale."""
        return (self.default_guidance_interval if guidance_scale == self.default_guidance_scale else None) or (0.0, 1.0)

    @property
    def defaults(self) -> dict[str, Any]:
        """What a request that leaves them out gets."""
        values = {"steps": self.default_steps, "guidance_scale": self.default_guidance_scale, "sampler": self.default_sampler}
        spacing = {"spacing": self.default_spacing} if self.default_spacing else {}
        interval = {"guidance_interval": list(self.default_guidance_interval)} if self.default_guidance_interval else {}
        return {**values, **spacing, **interval}


def _is_between(low: float, value: Any, high: Any) -> bool:
    return all(type(number) in (int, float) for number in (value, high)) and low <= value <= high


def is_interval(value: Any) -> bool:
    """[low, high] of t/T."""
    return isinstance(value, list | tuple) and len(value) == 2 and _is_between(0, value[0], value[1]) and value[1] <= 1
