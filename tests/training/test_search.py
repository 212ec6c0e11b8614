"""Which settings are measured and which are chosen, on a made-up model whose distances are a formula."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from model.checkpoint import Checkpoint, CheckpointConfig
from training.draw import Setting
from training.measure import Measured
from training.search import Grid, best, choose, finalists, front, interval_of, listed, make_grid, search


@pytest.fixture
def flow(build_checkpoint: Callable[..., Checkpoint]) -> CheckpointConfig:
    return build_checkpoint().config


@pytest.fixture
def diffusion(build_checkpoint: Callable[..., Checkpoint]) -> CheckpointConfig:
    return build_checkpoint("diffusion").config


def measured(evaluations: int, distance: float, steps: int = 4) -> Measured:
    return Measured(Setting(steps, "euler", 2.0), 100, evaluations, distance, 0.9, 1.0)


def distance(setting: Setting) -> float:
    """Best at many steps of a second-order sampler, at guidance 2.5 in 0–0.8, or 2 at all times."""
    order = 1 if setting.sampler in ("euler", "ddim") else 2
    wanted = 2.5 if setting.guidance_interval == (0.0, 0.8) else 2.0
    return (1.0 if wanted == 2.5 else 1.1) + 10 / setting.steps**order + abs(setting.guidance_scale - wanted)


class Meter:
    """Measures by the formula, and remembers what it was asked."""

    def __init__(self, config: CheckpointConfig) -> None:
        self.config, self.asked = config, dict[str, list[Setting]]()

    def __call__(self, title: str, settings: list[Setting]) -> list[Measured]:
        self.asked[title] = settings
        return [Measured(s, 100, s.evaluations(self.config), distance(s), 0.9, 1.0) for s in settings]


def test_the_front_holds_what_nothing_beats_in_both() -> None:
    cheap, good, worse, equal, dear = measured(8, 2.0), measured(10, 1.5), measured(12, 1.6), measured(12, 1.5), measured(40, 1.4)
    assert front([dear, worse, equal, cheap, good]) == [cheap, good, dear]


def test_choices_are_the_cheapest_within_their_share_of_the_best() -> None:
    draft, standard, beaten, lowest = measured(8, 1.30), measured(20, 1.05), measured(30, 1.02), measured(90, 1.0)
    assert choose([measured(7, 1.31), lowest, beaten, standard, draft]) == {"draft": draft, "standard": standard, "best": lowest}


def test_one_setting_may_be_all_three() -> None:
    only, dearer = measured(8, 1.0), measured(20, 1.0)
    assert choose([dearer, only]) == {"draft": only, "standard": only, "best": only}


def test_finals_are_the_front_and_what_chance_may_have_kept_from_it() -> None:
    rows = [(4, 9.0), (10, 1.5), (20, 1.10), (30, 1.13), (40, 1.0), (41, 1.03), (42, 1.04), (43, 1.16)]
    settings = [measured(evaluations, value, steps=evaluations) for evaluations, value in rows]
    assert {s.steps for s in finalists(settings)} == {4, 10, 20, 30, 40, 41}


def test_search_finds_the_best_guidance_sampler_and_interval_without_the_full_product(flow: CheckpointConfig) -> None:
    grid, meter = make_grid(flow), Meter(flow)
    found = search(flow, grid, meter)
    lowest = best(found).setting
    assert (lowest.sampler, lowest.steps, lowest.guidance_scale, lowest.guidance_interval) == ("ab2", 30, 2.5, (0.0, 0.8))
    product = sum(map(len, grid.steps_of.values())) * len(grid.guidance_scales) * len(grid.intervals)
    assert len(found) < product / 6
    assert {s.steps for s in meter.asked["guidance scales"]} == {12}, "a middle one"
    assert all(s.guidance_interval == (0.0, 1.0) for s in meter.asked["guidance scales"])


def test_no_picture_is_measured_twice_and_the_checkpoints_own_setting_is_measured(flow: CheckpointConfig) -> None:
    config = replace(flow, default_steps=37, default_guidance_scale=1.9)
    meter = Meter(config)
    found = search(config, make_grid(config), meter)
    asked = [s for settings in meter.asked.values() for s in settings]
    assert [m.setting for m in found] == asked
    assert len({s.pictures(config) for s in asked}) == len(asked)
    assert Setting(37, "euler", 1.9) in asked


def test_a_model_without_use_for_guidance_is_not_guided(flow: CheckpointConfig) -> None:
    def measure(title: str, settings: list[Setting]) -> list[Measured]:
        return [Measured(s, 100, s.evaluations(flow), s.guidance_scale + 1 / s.steps, 0.9, 1.0) for s in settings]

    found = search(flow, make_grid(flow), measure)
    assert best(found).setting == Setting(30, "ab2", 1.0)
    assert all(m.setting.guidance_interval == (0.0, 1.0) for m in found if m.setting.guidance_scale == 1)


def test_a_diffusion_model_tries_its_spacings_and_tells_each(diffusion: CheckpointConfig) -> None:
    meter = Meter(diffusion)
    found = search(diffusion, make_grid(diffusion), meter)
    assert {m.setting.spacing for m in found} == {"paper", "leading", "trailing", "log-snr"}
    assert {s.spacing for s in meter.asked["guidance scales"]} == {"log-snr"}, "its sampler's own"


def test_ancestral_samplers_are_tried_at_many_steps_alone_unless_named(diffusion: CheckpointConfig) -> None:
    assert make_grid(diffusion).steps_of["ddpm"] == (50,)
    assert "ddpm" not in make_grid(diffusion, steps=(5, 8)).steps_of
    assert make_grid(diffusion, steps=(8, 5), samplers=("ddpm",)).steps_of == {"ddpm": (5, 8)}


def test_a_model_without_learned_covariance_has_another_ancestral_sampler(build_checkpoint: Callable[..., Checkpoint]) -> None:
    grid = make_grid(build_checkpoint("diffusion", learn_sigma=False).config)
    assert "ddpm" not in grid.steps_of and grid.steps_of["ddpm-small"] == (50,)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": (0,)}, "between 1 and 1000, got 0"),
        ({"samplers": ("ddim",)}, "which has: euler, heun, ab2"),
        ({"guidance_scales": (1.0, 21.0)}, "between 1 and 20, got 21"),
        ({"intervals": ((0.0, 1.0), (0.9, 0.1))}, "got 0.9-0.1"),
        ({"block_caches": (1, 0)}, "block_cache must be at least 1"),
    ],
)
def test_a_grid_that_the_model_cannot_run_is_refused(flow: CheckpointConfig, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_grid(flow, **wrong)


def test_lists_are_read_from_the_command_line() -> None:
    assert listed("--steps", "5, 8,10", int) == (5, 8, 10)
    assert listed("--intervals", "0-1,0.1-0.8", interval_of) == ((0.0, 1.0), (0.1, 0.8))
    assert listed("--samplers", None, str) is None


@pytest.mark.parametrize(("text", "kind"), [("5,x", int), ("", int), ("0-1,0.5", interval_of), ("1e", float), ("0-1-2", interval_of)])
def test_a_list_that_cannot_be_read_names_its_option(text: str, kind: Callable[[str], Any]) -> None:
    with pytest.raises(ValueError, match=r"--option takes values with commas between them, got"):
        listed("--option", text, kind)


def test_a_grid_is_a_plain_value(flow: CheckpointConfig) -> None:
    given = make_grid(flow, (8, 4, 8), ("euler",), (2.0, 1.0), ((0.1, 0.8), (0.0, 1.0)), (3, 1, 2))
    assert given == Grid({"euler": (4, 8)}, (1.0, 2.0), ((0.1, 0.8), (0.0, 1.0)), (2, 3))
