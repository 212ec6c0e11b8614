"""A request's sampler as plain numbers."""

from collections.abc import Callable

import pytest

from model.config import ObjectiveConfig
from model.samplers import MAX_STATES, build_table
from worker.advance import REAL
from worker.plan import make_plan
from worker.protocol import ALL_CHANNELS, FIRST_THREE_CHANNELS, GenerationRequest

MakeRequest = Callable[..., GenerationRequest]


@pytest.mark.parametrize(
    ("objective", "sampler", "noisy"),
    [
        ("diffusion", "ddpm", [True] * 4 + [False]),  # the last step adds no noise
        ("diffusion", "sde-dpm-solver++", [True] * 4 + [False]),
        ("diffusion", "dpm-solver++", [False] * 5),
        ("flow", "ab2", [False] * 5),
        ("flow", "heun", [False] * 9),
    ],
)
def test_a_plan_has_one_row_of_plain_numbers_per_evaluation(
    make_request: MakeRequest, objective: str, sampler: str, noisy: list[bool]
) -> None:
    plan = make_plan(build_table(ObjectiveConfig(objective), sampler, 5), make_request(sampler=sampler, steps=5), 4)
    assert [len(column) for column in (plan.t, plan.coefficients, plan.guided, plan.all_blocks)] == [len(noisy)] * 4
    assert {len(row) for row in plan.coefficients} == {MAX_STATES**2 + MAX_STATES + 5} == {len(REAL) - 3}
    assert [row[REAL.index("d")] != 0 for row in plan.coefficients] == noisy
    assert (plan.t[0], plan.t[-1]) == ((999, 0) if objective == "diffusion" else (1, pytest.approx(0.2)))
    assert all(type(number) is float for row in plan.coefficients for number in row)


@pytest.mark.parametrize(
    ("scale", "interval", "guided"),
    [
        (1.0, (0.0, 1.0), [False] * 4),
        (2.0, (0.0, 1.0), [True] * 4),
        (2.0, (0.25, 0.5), [False, False, True, True]),  # Euler's times are 1, 3/4, 1/2, 1/4; both ends are in
        (2.0, (0.3, 0.4), [False] * 4),
    ],
)
def test_guidance_acts_inside_its_interval(
    make_request: MakeRequest, scale: float, interval: tuple[float, float], guided: list[bool]
) -> None:
    table = build_table(ObjectiveConfig("flow"), "euler", 4)
    assert make_plan(table, make_request(guidance_scale=scale, guidance_interval=interval), 4).guided == guided


@pytest.mark.parametrize(
    ("channels", "chosen", "moved"), [(4, ALL_CHANNELS, 4), (4, FIRST_THREE_CHANNELS, 3), (2, FIRST_THREE_CHANNELS, 2)]
)
def test_guidance_moves_all_channels_or_the_first_three(make_request: MakeRequest, channels: int, chosen: str, moved: int) -> None:
    table = build_table(ObjectiveConfig("flow"), "euler", 2)
    assert make_plan(table, make_request(guidance_channels=chosen), channels).guidance_channels == moved
