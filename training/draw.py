"""Pictures of a checkpoint as a worker serves them, many at once: one setting for all, picture i with seed i.

Every forward has the same number of rows, so that a compiled network has one graph whatever the steps, guidance and interval.
Shapes: N pictures · B of a batch · K classes · C, h, w latent.
"""

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from math import ceil, isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed

from model.checkpoint import Checkpoint, CheckpointConfig, load
from model.noise import normal
from model.samplers import SamplerTable, available_samplers, build_table
from model.sampling import SMALLEST_BATCH, sample_latents, to_pixels

_DECODE = 50  # pictures decoded at once: more are slower on a CPU
NO_INTERVAL = (0.0, 1.0)
ALL_CHANNELS, FIRST_THREE_CHANNELS = "all", "first-three"  # of a latent that guidance moves; the official code moves three


@dataclass(frozen=True)
class Setting:
    """How a picture is drawn; nothing is left to a default."""

    steps: int
    sampler: str
    guidance_scale: float
    guidance_interval: tuple[float, float] = NO_INTERVAL  # of t/T, both ends in
    spacing: str | None = None  # of a diffusion's times; a flow has none
    block_cache: int = 1  # all blocks run at every n-th evaluation only; 1 is off
    guidance_channels: str = ALL_CHANNELS

    def __post_init__(self) -> None:
        if not (isfinite(self.guidance_scale) and 1 <= self.guidance_scale <= 20):
            raise ValueError(f"guidance_scale must be between 1 and 20, got {self.guidance_scale}")
        low, high = self.guidance_interval
        if not 0 <= low <= high <= 1:
            raise ValueError(f"a guidance interval is low-high with 0 ≤ low ≤ high ≤ 1, got {low:g}-{high:g}")
        if self.block_cache < 1:
            raise ValueError(f"block_cache must be at least 1, which is off, got {self.block_cache}")
        if self.guidance_channels not in (ALL_CHANNELS, FIRST_THREE_CHANNELS):
            raise ValueError(f"guidance_channels are {ALL_CHANNELS} or {FIRST_THREE_CHANNELS}, got {self.guidance_channels!r}")

    def table(self, config: CheckpointConfig) -> SamplerTable:
        """The sampler's table; ValueError says what this model can do."""
        learn_sigma = config.architecture.learn_sigma
        known = available_samplers(config.objective, learn_sigma)
        if self.sampler not in known:
            raise ValueError(f"sampler {self.sampler!r} does not fit this checkpoint, which has: {', '.join(known)}")
        return build_table(config.objective, self.sampler, self.steps, learn_sigma=learn_sigma, spacing=self.spacing)

    def guided(self, config: CheckpointConfig) -> tuple[bool, ...]:
        """Whether it is guided, by evaluation."""
        low, high = self.guidance_interval
        return tuple(self.guidance_scale != 1 and low <= fraction <= high for fraction in self.table(config).fraction.tolist())

    def evaluations(self, config: CheckpointConfig) -> int:
        """Network evaluations of one picture: two where it is guided, else one."""
        return sum(2 if guided else 1 for guided in self.guided(config))

    def pictures(self, config: CheckpointConfig) -> Hashable:
        """Equal for settings that draw the same pictures, as those do whose intervals hold the same evaluations."""
        return replace(self, guidance_interval=NO_INTERVAL), self.guided(config)

    def entry(self) -> dict[str, Any]:
        """As it stands in `checkpoint.json`, in a log and in a request."""
        entry: dict[str, Any] = {"steps": self.steps, "sampler": self.sampler, "guidance_scale": self.guidance_scale}
        entry["guidance_interval"] = list(self.guidance_interval)
        if self.spacing is not None:
            entry["spacing"] = self.spacing
        if self.block_cache != 1:
            entry["block_cache"] = self.block_cache
        if self.guidance_channels != ALL_CHANNELS:
            entry["guidance_channels"] = self.guidance_channels
        return entry


def default_setting(
    config: CheckpointConfig, steps: int | None = None, guidance_scale: float | None = None, sampler: str | None = None
) -> Setting:
    """The checkpoint's own setting, but for what is given. A given scale that is not the default one is for all times."""
    scale = config.default_guidance_scale if guidance_scale is None else guidance_scale
    sampler = sampler or config.default_sampler
    return Setting(
        steps=config.default_steps if steps is None else steps,
        sampler=sampler,
        guidance_scale=scale,
        guidance_interval=config.guidance_interval_of(scale),
        spacing=config.spacing_of(sampler),
    )


def load_as_served(folder: Path) -> Checkpoint:
    """On a GPU where there is one. The network is in bfloat16 where the processor has it; on a CPU the VAE is in float32."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    checkpoint = load(folder, device)
    native = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
    dtype = torch.bfloat16 if native else torch.float32
    checkpoint.dit.to(dtype)
    if checkpoint.vae:
        checkpoint.vae.cast(dtype if device.type == "cuda" else torch.float32)
    return checkpoint


LABELS = ("balanced", "random")


def asked_labels(kind: str, count: int, classes: int) -> Tensor:
    """(N,) classes to draw: `balanced` is each in turn, `random` as in the paper's script. ValueError for another kind."""
    if kind not in LABELS:
        raise ValueError(f"labels are {' or '.join(LABELS)}, got {kind!r}")
    if kind == "balanced":
        return torch.arange(count) % classes
    return torch.randint(classes, (count,), generator=torch.Generator().manual_seed(0))


class Drawer:
    """Holds a checkpoint with a VAE, and its network in the form that draws: with `compile` compiled, if there is a compiler."""

    def __init__(self, checkpoint: Checkpoint, rows: int, *, compile: bool) -> None:
        assert checkpoint.vae is not None
        self.checkpoint, self.vae = checkpoint, checkpoint.vae
        self.rows = max(rows, SMALLEST_BATCH)  # pictures of a batch, and rows of a forward
        self.compiled = False
        self._network: Any = checkpoint.dit
        self._cached_network: Any = checkpoint.dit.cached
        self.vae.autoencoder.to(memory_format=torch.channels_last)
        if compile:
            self._compile()

    @torch.inference_mode()
    def _compile(self) -> None:
        dit = self.checkpoint.dit
        self._network, self._cached_network = torch.compile(dit, dynamic=False), torch.compile(dit.cached, dynamic=False)
        self.compiled = True
        try:
            x = self._initial(torch.zeros(1, dtype=torch.int64))
            self._forward(x, torch.zeros(1, device=x.device), torch.zeros(1, dtype=torch.int64, device=x.device))
        except BackendCompilerFailed:  # none there, or one that does not work
            self._network, self._cached_network, self.compiled = dit, dit.cached, False

    @property
    def dtype(self) -> str:
        return str(next(self.checkpoint.dit.parameters()).dtype).removeprefix("torch.")

    def forwards(self, setting: Setting, pictures: int) -> int:
        """Forwards of `rows` rows that so many pictures cost."""
        full, rest = divmod(pictures, self.rows)
        guided = setting.guided(self.checkpoint.config)
        return full * (len(guided) + sum(guided)) + sum(ceil(rest * (1 + twice) / self.rows) for twice in guided)

    def pictures(self, setting: Setting, labels: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Of class labels (N,), and seeds from 0: batches of labels (B,), seeds (B,) and pictures (B, H, W, channels) uint8, on the CPU."""
        for part, seeds in zip(labels.split(self.rows), torch.arange(len(labels)).split(self.rows), strict=True):
            yield part, seeds, self.draw(setting, part, seeds)

    @torch.inference_mode()
    def draw(self, setting: Setting, labels: Tensor, seeds: Tensor) -> Tensor:
        """Class labels (B,) and seeds (B,) → pictures (B, H, W, channels), uint8 on the CPU."""
        device, noise = self.checkpoint.device, self._initial(seeds)
        latents = sample_latents(
            self._forward,
            noise,
            labels.to(device),
            self.checkpoint.config.architecture.null_class,
            setting.table(self.checkpoint.config),
            guidance_scale=setting.guidance_scale,
            guidance_interval=setting.guidance_interval,
            guidance_channels=None if setting.guidance_channels == ALL_CHANNELS else min(3, noise.shape[1]),
            block_cache=setting.block_cache,
            cached=self._cached,
            seeds=seeds.to(device),
        )
        return torch.cat([to_pixels(self.vae.decode(part)).cpu() for part in latents.split(_DECODE)])

    def _initial(self, seeds: Tensor) -> Tensor:
        """The latents (B, C, h, w) that pictures begin with."""
        c, seeds = self.checkpoint.config.architecture, seeds.to(self.checkpoint.device)
        return normal(seeds, torch.zeros_like(seeds), (c.in_channels, c.input_size, c.input_size))

    def _forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """DiT.forward over any number of rows, `rows` at a time."""
        parts = zip(*(self._parts(column) for column in (x, t, y)), strict=True)
        return torch.cat([self._network(*part) for part in parts])[: len(x)]

    def _cached(self, x: Tensor, t: Tensor, y: Tensor, change: Tensor | None) -> tuple[Tensor, Tensor]:
        """DiT.cached over any number of rows."""
        columns = (x, t, y) if change is None else (x, t, y, change)
        done = [self._cached_network(*part) for part in zip(*(self._parts(column) for column in columns), strict=True)]
        return torch.cat([out for out, _ in done])[: len(x)], torch.cat([changed for _, changed in done])[: len(x)]

    def _parts(self, column: Tensor) -> list[Tensor]:
        """Parts of `rows` rows, the last one padded, each a tensor of its own: for a view the compiler might make another graph."""
        missing = -len(column) % self.rows
        padded = torch.cat([column, column[:1].expand(missing, *column.shape[1:])])
        return [part.clone() for part in padded.split(self.rows)]
