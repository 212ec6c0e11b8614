"""Which settings `dit tune` measures, and which it chooses. No pictures are drawn here: `measure` is given.

The full product of steps, samplers, scales and intervals is over a thousand settings, so each round varies one thing of the best so far.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import TypeVar

from model.checkpoint import CheckpointConfig
from model.samplers import available_spacings
from training.draw import NO_INTERVAL, Setting, default_setting
from training.measure import Measured

NEAR_BEST = 1.15  # times the best distance: what is measured again although something cheaper was better
STANDARD, DRAFT = 1.05, 1.30  # times the best distance that the cheapest setting may have
# A smaller ratio of two first distances decides nothing: from 400 to 1500 pictures the distances of nine settings of a diffusion checkpoint
# changed by a factor whose standard deviation was 1.9 %.
_CHANCE = 1.03
_PROMISING = 1.4  # times the best distance: what is varied further

T = TypeVar("T")
Measure = Callable[[str, list[Setting]], list[Measured]]  # a title, and settings → the same settings, measured


@dataclass(frozen=True)
class Grid:
    """The values tried of each. Guidance scales are first compared with the first sampler and the first interval."""

    steps_of: dict[str, tuple[int, ...]]  # by sampler
    guidance_scales: tuple[float, ...]
    intervals: tuple[tuple[float, float], ...]
    block_caches: tuple[int, ...] = ()  # that the chosen are measured with besides

    def check(self, config: CheckpointConfig) -> None:
        """ValueError before minutes are spent."""
        for sampler, steps in self.steps_of.items():
            for count in steps:
                Setting(count, sampler, 1.0).table(config)
        for scale in self.guidance_scales:
            for interval in self.intervals:
                Setting(1, "", scale, interval)
        for every in self.block_caches:
            Setting(1, "", 1.0, block_cache=every)

    def beside(self, scale: float) -> list[float]:
        """The next lower and the next higher guidance scale."""
        lower, higher = ([s for s in self.guidance_scales if s < scale], [s for s in self.guidance_scales if s > scale])
        return lower[-1:] + higher[:1]


_INTERVALS = (NO_INTERVAL, (0.0, 0.8), (0.0, 0.65), (0.15, 0.8), (0.15, 0.65))
_SCALES = (1.0, 1.3, 1.5, 1.7, 2.0, 2.5, 3.0, 4.0, 5.5, 7.5)  # tenths, as the page has them
_ANY = (-inf, inf)


def _usual_samplers(config: CheckpointConfig) -> dict[str, tuple[float, float]]:
    """Those tried when none is named, and from and to how many steps. Second order comes first: it is good at few steps."""
    if config.objective.kind == "flow":
        return {"ab2": _ANY, "euler": _ANY, "heun": (-inf, 16)}  # heun takes 31 evaluations for 16
    ancestral = "ddpm" if config.architecture.learn_sigma else "ddpm-small"
    return {"dpm-solver++": _ANY, "ddim": _ANY, "sde-dpm-solver++": (12, inf), ancestral: (50, inf)}


def make_grid(
    config: CheckpointConfig,
    steps: Sequence[int] | None = None,
    samplers: Sequence[str] | None = None,
    guidance_scales: Sequence[float] | None = None,
    intervals: Sequence[tuple[float, float]] | None = None,
    block_caches: Sequence[int] | None = None,
) -> Grid:
    """What is not given is chosen so that a small model takes less than an hour on two cores. ValueError for what the model cannot do."""
    counts = steps or ((4, 6, 8, 10, 12, 16, 20, 30) if config.objective.kind == "flow" else (5, 8, 10, 12, 16, 20, 30, 50))
    spans = dict.fromkeys(samplers, _ANY) if samplers else _usual_samplers(config)
    steps_of = {name: tuple(n for n in sorted(set(counts)) if low <= n <= high) for name, (low, high) in spans.items()}
    grid = Grid(
        {name: found for name, found in steps_of.items() if found},
        tuple(sorted(set(guidance_scales or _SCALES))),
        tuple(dict.fromkeys(intervals or _INTERVALS)),
        tuple(sorted({*(block_caches or ())} - {1})),
    )
    grid.check(config)
    return grid


def listed(option: str, text: str | None, kind: Callable[[str], T]) -> tuple[T, ...] | None:
    """`5,8,10` → its values; None for an option that was not given. ValueError names the option."""
    if text is None:
        return None
    try:
        return tuple(kind(part.strip()) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"{option} takes values with commas between them, got {text!r}") from error


def interval_of(text: str) -> tuple[float, float]:
    """`0.1-0.8` → (0.1, 0.8). ValueError for anything else."""
    low, high = text.split("-")
    return float(low), float(high)


def search(config: CheckpointConfig, grid: Grid, measure: Measure) -> list[Measured]:
    """The first stage, by rounds."""
    return _Search(config, grid, measure).run()


class _Search:
    def __init__(self, config: CheckpointConfig, grid: Grid, measure: Measure) -> None:
        self.config, self.grid, self.measure = config, grid, measure
        self.found: dict[Hashable, Measured] = {}  # by the pictures they draw

    def run(self) -> list[Measured]:
        grid, first = self.grid, next(iter(self.grid.steps_of))
        steps = grid.steps_of[first]
        scale = self._best_scale([self._plain(first, steps[len(steps) // 2], scale) for scale in grid.guidance_scales])
        everywhere = [self._plain(sampler, n, scale) for sampler, counts in grid.steps_of.items() for n in counts]
        self._round("steps and samplers, and the checkpoint's defaults", [*everywhere, default_setting(self.config)])
        self._intervals(self._promising())
        self._vary("guidance scales again", lambda s: [_guided(s, scale, s.guidance_interval) for scale in grid.beside(s.guidance_scale)])
        self._vary("spacings", lambda s: [replace(s, spacing=spacing) for spacing in available_spacings(self.config.objective)])
        return list(self.found.values())

    def _best_scale(self, settings: list[Setting]) -> float:
        self._round("guidance scales", settings)
        return best(self.found.values()).setting.guidance_scale

    def _intervals(self, settings: list[Setting]) -> None:
        """All intervals at one setting, with its scale and the next, since more guidance may do well in less time; the best elsewhere."""
        middle = settings[len(settings) // 2]
        scales = [scale for scale in self.grid.guidance_scales if scale >= middle.guidance_scale][:2]
        varied = [_guided(middle, scale, interval) for scale in scales for interval in self.grid.intervals]
        self._round("guidance intervals", varied)
        good = [m.setting for m in front(self.found[s.pictures(self.config)] for s in varied)]
        self._round("the best of them", [_guided(s, g.guidance_scale, g.guidance_interval) for s in settings for g in good])

    def _vary(self, title: str, variants: Callable[[Setting], list[Setting]]) -> None:
        self._round(title, [variant for setting in self._promising() for variant in variants(setting)])

    def _round(self, title: str, settings: list[Setting]) -> None:
        """Settings that draw the same pictures are measured once."""
        new: dict[Hashable, Setting] = {}
        for setting in settings:
            new.setdefault(setting.pictures(self.config), setting)
        new = {key: setting for key, setting in new.items() if key not in self.found}
        if new:
            self.found.update(zip(new, self.measure(title, list(new.values())), strict=True))

    def _promising(self) -> list[Setting]:
        found = self.found.values()
        return [m.setting for m in front(found) if m.frechet_distance <= _PROMISING * best(found).frechet_distance]

    def _plain(self, sampler: str, steps: int, scale: float) -> Setting:
        return _guided(Setting(steps, sampler, scale, spacing=self.config.spacing_of(sampler)), scale, self.grid.intervals[0])


def _guided(setting: Setting, scale: float, interval: tuple[float, float]) -> Setting:
    """Without guidance there is no interval."""
    return replace(setting, guidance_scale=scale, guidance_interval=interval if scale != 1 else NO_INTERVAL)


def best(measured: Iterable[Measured]) -> Measured:
    """The lowest distance; of equals the cheapest."""
    return min(measured, key=lambda m: (m.frechet_distance, m.evaluations))


def front(measured: Iterable[Measured]) -> list[Measured]:
    """Those that no other beats in both evaluations and distance, cheapest first."""
    kept: list[Measured] = []
    for m in sorted(measured, key=lambda m: (m.evaluations, m.frechet_distance)):
        if not kept or m.frechet_distance < kept[-1].frechet_distance:
            kept.append(m)
    return kept


def finalists(measured: Sequence[Measured]) -> list[Setting]:
    """What is measured again with many pictures: the front, and besides what is near the best and may be on the front but for chance."""
    limit = NEAR_BEST * best(measured).frechet_distance

    def clearly_beaten(m: Measured) -> bool:
        return any(o.evaluations <= m.evaluations and _CHANCE * o.frechet_distance < m.frechet_distance for o in measured)

    near = [m for m in measured if m.frechet_distance <= limit and not clearly_beaten(m)]
    return list(dict.fromkeys(m.setting for m in [*front(measured), *near]))


def choose(finals: Iterable[Measured]) -> dict[str, Measured]:
    """draft, standard and best. Every standard is good enough for a draft, so a draft is never dearer."""
    finals = list(finals)
    lowest = best(finals)

    def cheapest(factor: float) -> Measured:
        good = [m for m in finals if m.frechet_distance <= factor * lowest.frechet_distance]
        return min(good, key=lambda m: (m.evaluations, m.frechet_distance))

    return {"draft": cheapest(DRAFT), "standard": cheapest(STANDARD), "best": lowest}
