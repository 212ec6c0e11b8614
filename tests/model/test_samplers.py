"""Tables of samplers: where they evaluate, each row against its formula, and exact answers for a point mass and for Gaussian data.

diffusers' schedulers are held beside them in tests/model/test_schedulers_of_diffusers.py.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model import samplers
from model.checkpoint import Checkpoint, load, save
from model.config import ObjectiveConfig
from model.diffusion import GaussianDiffusion
from model.noise import normal
from model.samplers import SamplerTable, available_samplers, available_spacings, build_table, max_steps
from model.sampling import sample_latents, update
from model.spacing import SPACINGS, flow_times, leading, log_snr, paper, trailing

DIFFUSION, V, FLOW = ObjectiveConfig("diffusion"), ObjectiveConfig("diffusion", prediction="v"), ObjectiveConfig("flow")
SAMPLERS = {"diffusion": list(samplers.DIFFUSION), "flow": list(samplers.FLOW)}
EVERY_SAMPLER = [(objective, name) for objective in (DIFFUSION, FLOW) for name in SAMPLERS[objective.kind]]
SHAPE = (4, 3, 3)
QUIET = settings(database=None, deadline=None, derandomize=True, max_examples=60)


def with_steps(steps: int) -> ObjectiveConfig:
    return ObjectiveConfig("diffusion", num_timesteps=steps)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(math.prod(shape)))


def run(table: SamplerTable, network: Callable[[Tensor, Tensor], Tensor], rows: int = 3) -> Tensor:
    """The whole loop in float64, from model.noise's latents and with its noise."""
    seeds = torch.arange(rows) + 100
    latents = normal(seeds, torch.zeros_like(seeds), SHAPE).double()
    return sample_latents(lambda x, t, _: network(x, t), latents, torch.zeros_like(seeds), 10, table, seeds=seeds)


# --- spacings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [2, 3, 7, 25, 250, 999, 1000])
def test_the_papers_times_reach_both_ends_in_equal_strides(steps: int) -> None:
    times, stride = paper(DIFFUSION, steps), 999 / (steps - 1)
    assert times[0] == 0 and times[-1] == 999 and len(times) == steps
    assert all(abs(t - i * stride) <= 0.5 + 1e-9 for i, t in enumerate(times))


def test_spacings_list_these_times() -> None:
    assert paper(DIFFUSION, 5) == [0, 250, 500, 749, 999]  # 499.5 rounds to even, as Python and the official code do
    assert paper(DIFFUSION, 1000) == leading(DIFFUSION, 1000) == trailing(DIFFUSION, 1000) == list(range(1000))
    assert leading(DIFFUSION, 4) == [0, 250, 500, 750]
    assert leading(DIFFUSION, 7) == [0, 142, 284, 426, 568, 710, 852]
    assert trailing(DIFFUSION, 4) == [249, 499, 749, 999]
    assert trailing(DIFFUSION, 7) == [142, 285, 428, 570, 713, 856, 999]
    assert trailing(DIFFUSION, 16)[:4] == [61, 124, 187, 249]  # 187.5 rounds to even, before 1 is taken off


def test_one_step_begins_at_pure_noise() -> None:
    """All but leading, which has t = 0 alone, as diffusers has it."""
    assert paper(DIFFUSION, 1) == trailing(DIFFUSION, 1) == log_snr(DIFFUSION, 1) == [999]
    assert leading(DIFFUSION, 1) == [0]


@pytest.mark.parametrize("steps", [2, 5, 12])
def test_log_snr_times_are_nearest_to_equal_distances(steps: int) -> None:
    alpha_bar = GaussianDiffusion(DIFFUSION).alpha_bar.tolist()
    snr = [math.log(a / (1 - a)) for a in alpha_bar]
    times = log_snr(DIFFUSION, steps)
    assert times[0] == 0 and times[-1] == 999 and len(times) == steps
    for i, t in enumerate(times):
        wanted = snr[0] + i * (snr[-1] - snr[0]) / (steps - 1)
        assert abs(snr[t] - wanted) <= min(abs(s - wanted) for s in snr) + 1e-9


def test_a_time_that_several_steps_fall_on_is_evaluated_once() -> None:
    """Between t = 0 and 1 the log SNR makes its longest step."""
    times = log_snr(DIFFUSION, 100)
    assert len(times) < 100 and len(set(times)) == len(times)
    assert build_table(DIFFUSION, "ddim", 100, spacing="log-snr").evaluations == len(times)


@QUIET
@given(st.integers(2, 1000).flatmap(lambda total: st.tuples(st.just(total), st.integers(1, total))), st.sampled_from(sorted(SPACINGS)))
def test_times_of_any_spacing_are_distinct_ascending_and_within_the_process(counts: tuple[int, int], spacing: str) -> None:
    total, steps = counts
    times = SPACINGS[spacing](with_steps(total), steps)
    assert all(type(t) is int for t in times)
    assert all(before < after for before, after in itertools.pairwise(times)) and times[0] >= 0 and times[-1] < total
    assert len(times) == steps or (spacing == "log-snr" and len(times) < steps)


def test_flow_times_fall_from_one_to_zero_and_a_shift_moves_them_towards_noise() -> None:
    assert flow_times(4).tolist() == [1, 0.75, 0.5, 0.25, 0]
    shifted = flow_times(4, shift=3.0).tolist()
    assert shifted == pytest.approx([1, 0.9, 0.75, 0.5, 0]) and (shifted[0], shifted[-1]) == (1, 0)
    assert flow_times(4, shift=1 / 3).tolist() == pytest.approx([1, 0.5, 0.25, 0.1, 0])
    assert build_table(FLOW, "euler", 4, shift=3.0).t.tolist() == pytest.approx(shifted[:-1])


# --- which tables there are --------------------------------------------------------------------------------------------


def test_each_objective_has_its_samplers_and_spacings() -> None:
    fixed = ["ddpm-small", "ddpm-large", "ddim", "dpm-solver++", "sde-dpm-solver++"]
    assert available_samplers(DIFFUSION, learn_sigma=True) == ["ddpm", *fixed], "ddpm needs the learned covariance"
    assert available_samplers(DIFFUSION, learn_sigma=False) == fixed
    assert available_samplers(FLOW, learn_sigma=False) == ["euler", "heun", "ab2"]
    assert available_spacings(DIFFUSION) == ["paper", "leading", "trailing", "log-snr"] and available_spacings(FLOW) == []
    assert max_steps(with_steps(50)) == 50 and max_steps(FLOW) == max_steps(DIFFUSION) == 1000


@pytest.mark.parametrize(
    ("objective", "sampler", "arguments", "message"),
    [
        (DIFFUSION, "euler", {}, r"'euler' does not fit .*diffusion.*: ddpm, ddpm-small, ddpm-large, ddim, dpm-solver\+\+, sde"),
        (DIFFUSION, "ddpm", {"learn_sigma": False}, r"'ddpm' does not fit .*: ddpm-small, ddpm-large, ddim"),
        (FLOW, "ddim", {}, r"'ddim' does not fit .*flow.*: euler, heun, ab2"),
        (FLOW, "euler", {"spacing": "paper"}, r"'paper' is for diffusion; .* shift"),
        (FLOW, "euler", {"eta": 0.5}, r"eta is 0 … 1 and belongs to the sampler ddim, got 0.5 for euler"),
        (FLOW, "heun", {"shift": 0.0}, r"shift must be above 0 and at most 100, got 0"),
        (FLOW, "heun", {"shift": -1.0}, r"shift must be above 0 and at most 100, got -1"),
        (FLOW, "heun", {"shift": 100.5}, r"shift must be above 0 and at most 100, got 100.5"),
        (FLOW, "heun", {"shift": math.nan}, r"shift must be above 0 and at most 100, got nan"),
        (DIFFUSION, "ddim", {"spacing": "karras"}, r"no spacing 'karras'; there is: paper, leading, trailing, log-snr"),
        (DIFFUSION, "ddim", {"spacing": ""}, r"no spacing ''; there is: paper"),
        (DIFFUSION, "ddim", {"shift": 3.0}, r"shift is for flow models; this one has spacing: paper, leading, trailing, log-snr"),
        (DIFFUSION, "ddim", {"shift": math.nan}, r"shift is for flow models"),
        (DIFFUSION, "ddim", {"eta": 1.1}, r"eta is 0 … 1 and belongs to the sampler ddim, got 1.1"),
        (DIFFUSION, "ddim", {"eta": -0.1}, r"eta is 0 … 1 and belongs to the sampler ddim, got -0.1"),
        (DIFFUSION, "ddim", {"eta": math.nan}, r"eta is 0 … 1 and belongs to the sampler ddim, got nan"),
        (DIFFUSION, "ddpm-small", {"eta": 0.5}, r"eta is 0 … 1 and belongs to the sampler ddim, got 0.5 for ddpm-small"),
    ],
    ids=str,
)
def test_an_error_names_what_is_allowed(objective: ObjectiveConfig, sampler: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_table(objective, sampler, 10, **arguments)


@pytest.mark.parametrize(("objective", "allowed"), [(DIFFUSION, 1000), (FLOW, 1000), (with_steps(50), 50)], ids=["T=1000", "flow", "T=50"])
def test_steps_out_of_range_are_told_with_the_range(objective: ObjectiveConfig, allowed: int) -> None:
    for steps in (0, -1, allowed + 1):
        with pytest.raises(ValueError, match=f"steps must be between 1 and {allowed}, got {steps}"):
            build_table(objective, SAMPLERS[objective.kind][0], steps)


def test_a_checkpoint_may_have_a_spacing_of_its_own(build_checkpoint: Callable[..., Checkpoint], tmp_path: Path) -> None:
    checkpoint = build_checkpoint("diffusion")
    assert "spacing" not in checkpoint.config.defaults, "the paper's goes without saying, and the checkpoint keeps its hash"
    checkpoint.config = replace(checkpoint.config, default_spacing="log-snr")
    save(tmp_path / "one", checkpoint, card="# One")
    loaded = load(tmp_path / "one").config
    assert loaded.default_spacing == "log-snr" and loaded.defaults["spacing"] == "log-snr"
    with pytest.raises(ValueError, match="'karras'"):
        replace(checkpoint.config, default_spacing="karras")
    with pytest.raises(ValueError, match="'paper'"):
        replace(build_checkpoint("flow").config, default_spacing="paper")


@st.composite
def tables(draw: st.DrawFn) -> tuple[ObjectiveConfig, str, int, SamplerTable]:
    """Any sampler, spacing or shift, and number of steps of a short process or a long one."""
    if draw(st.booleans()):
        sampler, steps, shift = draw(st.sampled_from(SAMPLERS["flow"])), draw(st.integers(1, 30)), draw(st.floats(0.05, 100))
        return FLOW, sampler, steps, build_table(FLOW, sampler, steps, shift=shift)
    total = draw(st.sampled_from([2, 3, 17, 1000]))
    objective = ObjectiveConfig("diffusion", num_timesteps=total, prediction=draw(st.sampled_from(["noise", "v"])))
    sampler, steps = draw(st.sampled_from(SAMPLERS["diffusion"])), draw(st.integers(1, min(total, 30)))
    eta = draw(st.floats(0, 1)) if sampler == "ddim" else 0.0
    return objective, sampler, steps, build_table(objective, sampler, steps, spacing=draw(st.sampled_from(sorted(SPACINGS))), eta=eta)


@QUIET
@given(tables())
def test_any_table_is_finite_goes_down_in_time_and_ends_without_noise(case: tuple[ObjectiveConfig, str, int, SamplerTable]) -> None:
    _, sampler, _, table = case
    assert table.a.shape == (table.evaluations, table.states, table.states) and table.b.shape == (table.evaluations, table.states)
    for values in (table.t, table.fraction, table.a, table.b, table.d, table.log_variance_low, table.log_variance_high):
        assert len(values) == table.evaluations and values.dtype == torch.float64 and bool(values.isfinite().all())
    steps_down = -table.t.diff()
    assert bool((steps_down >= 0).all() if sampler == "heun" else (steps_down > 0).all())
    assert float(table.fraction.min()) >= 0 and float(table.fraction.max()) <= 1
    assert bool((table.d >= 0).all()) and table.d[-1] == 0, "the last evaluation adds no noise"


@QUIET
@given(tables())
def test_a_point_mass_is_reached_from_every_start(case: tuple[ObjectiveConfig, str, int, SamplerTable]) -> None:
    objective, sampler, _, table = case
    point = torch.linspace(-1, 1, math.prod(SHAPE), dtype=torch.float64).view(1, *SHAPE)

    def exact(x: Tensor, t: Tensor) -> Tensor:
        if objective.kind == "flow":
            return (x - point) / t.double().view(-1, 1, 1, 1)
        process = GaussianDiffusion(objective)
        alpha, sigma = process.alpha[t.long()].view(-1, 1, 1, 1), process.sigma[t.long()].view(-1, 1, 1, 1)
        noise = (x - alpha * point) / sigma
        predicted = noise if objective.prediction == "noise" else alpha * noise - sigma * point
        return torch.cat([predicted, torch.sin(x)], dim=1) if sampler == "ddpm" else predicted

    latents = run(table, exact)
    torch.testing.assert_close(latents, point.expand_as(latents), rtol=0, atol=1e-5)  # the time given to the network is float32


@pytest.mark.parametrize(
    ("sampler", "steps", "evaluations"), [("euler", 9, 9), ("ab2", 9, 9), ("heun", 1, 1), ("heun", 2, 3), ("heun", 9, 17)]
)
def test_heun_evaluates_twice_a_step_but_once_in_the_last(sampler: str, steps: int, evaluations: int) -> None:
    assert build_table(FLOW, sampler, steps).evaluations == evaluations


def test_heun_evaluates_at_both_ends_of_a_step() -> None:
    assert build_table(FLOW, "heun", 4).t.tolist() == [1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25]


@pytest.mark.parametrize(("objective", "sampler"), EVERY_SAMPLER, ids=[name for _, name in EVERY_SAMPLER])
def test_a_padded_table_is_the_same_sampler(objective: ObjectiveConfig, sampler: str) -> None:
    table = build_table(objective, sampler, 6)
    padded = table.padded(3)
    assert (padded.states, padded.b.shape) == (3, (table.evaluations, 3))

    def network(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([torch.sin(3 * x), torch.cos(x)], dim=1) if sampler == "ddpm" else torch.sin(3 * x)

    assert torch.equal(run(padded, network), run(table, network))


# --- rows against their formulas ---------------------------------------------------------------------------------------


def apply_row(table: SamplerTable, i: int, x: Tensor, out: Tensor, noise: Tensor) -> Tensor:
    numbers = (table.a, table.b, table.d, table.log_variance_low, table.log_variance_high)
    return update(x[:, None], out, *(v[i].to(x.dtype).expand(len(x), *v.shape[1:]) for v in numbers), noise)[:, 0]


@pytest.mark.parametrize("objective", [DIFFUSION, V], ids=["noise", "v"])
@pytest.mark.parametrize("t", [999, 998, 500, 2, 1, 0])
def test_a_ddpm_row_is_the_reference_reverse_step(objective: ObjectiveConfig, t: int) -> None:
    x, noise, out = draw(3, *SHAPE), draw(3, *SHAPE) + 1, draw(3, 8, 3, 3)
    mean, log_variance, _ = GaussianDiffusion(objective).p_mean_variance(out, x, torch.full((3,), t))
    table = build_table(objective, "ddpm", 1000)
    assert table.t[999 - t] == t
    torch.testing.assert_close(apply_row(table, 999 - t, x, out, noise), mean + (t > 0) * torch.exp(log_variance / 2) * noise)


def test_a_respaced_ddpm_row_is_the_posterior_between_its_own_times() -> None:
    """x_s from x_t for s < t is Bayes' rule with β = 1 − ᾱ_t/ᾱ_s, whatever lies between."""
    table = build_table(DIFFUSION, "ddpm", 5)
    t, s = 749, 500
    alpha, alpha_s = (float(GaussianDiffusion(DIFFUSION).alpha_bar[i]) for i in (t, s))
    x0, x = 0.3, -0.8
    noise = (x - math.sqrt(alpha) * x0) / math.sqrt(1 - alpha)
    covariance = math.sqrt(alpha / alpha_s) * (1 - alpha_s)
    mean = math.sqrt(alpha_s) * x0 + covariance / (1 - alpha) * (x - math.sqrt(alpha) * x0)
    variance = (1 - alpha_s) - covariance**2 / (1 - alpha)
    row = table.t.tolist().index(t)
    assert float(table.a[row, 0, 0]) * x + float(table.b[row, 0]) * noise == pytest.approx(mean, rel=1e-9)
    assert float(table.log_variance_low[row]) == pytest.approx(math.log(variance), rel=1e-9)
    assert float(table.log_variance_high[row]) == pytest.approx(math.log(1 - alpha / alpha_s), rel=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_a_ddim_row_is_equation_12(eta: float) -> None:
    table, alpha_bar = build_table(DIFFUSION, "ddim", 10, eta=eta), GaussianDiffusion(DIFFUSION).alpha_bar
    x, out, noise = draw(2, *SHAPE), draw(2, 8, 3, 3), draw(2, *SHAPE) - 1
    for i, (now, following) in enumerate(zip(table.t.long(), [*table.t.long()[1:], None], strict=True)):
        alpha = alpha_bar[now]
        alpha_next = alpha_bar[following] if following is not None else torch.tensor(1.0).double()
        sigma = eta * ((1 - alpha_next) / (1 - alpha)).sqrt() * (1 - alpha / alpha_next).sqrt()
        x0 = (x - (1 - alpha).sqrt() * out[:, :4]) / alpha.sqrt()
        expected = alpha_next.sqrt() * x0 + (1 - alpha_next - sigma**2).sqrt() * out[:, :4] + sigma * noise
        torch.testing.assert_close(apply_row(table, i, x, out, noise), expected)


# --- samplers that are one another -------------------------------------------------------------------------------------


def wavy(v: float | None = None) -> Callable[[Tensor, Tensor], Tensor]:
    """A nonlinear network, whose covariance channels, if it has any, are all v."""

    def network(x: Tensor, t: Tensor) -> Tensor:
        predicted = torch.sin(3 * x + 0.002 * t.double().view(-1, 1, 1, 1))
        return predicted if v is None else torch.cat([predicted, torch.full_like(x, v)], dim=1)

    return network


@pytest.mark.parametrize("spacing", sorted(SPACINGS))
@pytest.mark.parametrize("objective", [DIFFUSION, V], ids=["noise", "v"])
def test_ancestral_samplers_meet_where_they_should(objective: ObjectiveConfig, spacing: str) -> None:
    def latents(sampler: str, v: float | None = None, eta: float = 0.0) -> Tensor:
        return run(build_table(objective, sampler, 9, spacing=spacing, eta=eta), wavy(v))

    small, large = latents("ddpm-small"), latents("ddpm-large")
    assert float((small - large).abs().max()) > 0.1
    torch.testing.assert_close(latents("ddpm", v=-1.0), small, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(latents("ddpm", v=1.0), large, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(latents("ddim", eta=1.0), small, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sampler", SAMPLERS["diffusion"])
def test_a_network_of_v_gives_what_the_same_network_of_noise_gives(sampler: str) -> None:
    process = GaussianDiffusion(DIFFUSION)
    noise_network = wavy(0.3 if sampler == "ddpm" else None)

    def v_network(x: Tensor, t: Tensor) -> Tensor:
        """v = α·ε − σ·x₀."""
        out, alpha, sigma = noise_network(x, t), process.alpha[t.long()].view(-1, 1, 1, 1), process.sigma[t.long()].view(-1, 1, 1, 1)
        x0 = (x - sigma * out[:, :4]) / alpha
        return torch.cat([alpha * out[:, :4] - sigma * x0, out[:, 4:]], dim=1)

    for spacing in SPACINGS:
        one, other = (run(build_table(o, sampler, 8, spacing=spacing), n) for o, n in ((DIFFUSION, noise_network), (V, v_network)))
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("sampler", SAMPLERS["flow"])
def test_a_straight_path_is_followed_exactly(sampler: str, shift: float) -> None:
    seeds = torch.arange(3) + 100
    start, velocity = normal(seeds, torch.zeros_like(seeds), SHAPE).double(), draw(3, *SHAPE)
    end = run(build_table(FLOW, sampler, 7, shift=shift), lambda x, t: velocity)
    torch.testing.assert_close(end, start - velocity)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("sampler", ["heun", "ab2"])
def test_second_order_follows_a_velocity_that_is_linear_in_time_but_for_a_first_order_end(sampler: str, shift: float) -> None:
    """∫t dt is exact by trapezium and by extrapolation; Heun's last and the multistep's first step are Euler's."""
    times = flow_times(7, shift)
    h = float(times[-2] if sampler == "heun" else 1 - times[1])
    seeds = torch.arange(3) + 100
    start = normal(seeds, torch.zeros_like(seeds), SHAPE).double()
    end = run(build_table(FLOW, sampler, 7, shift=shift), lambda x, t: t.double().view(-1, 1, 1, 1).expand_as(x))
    torch.testing.assert_close(end, start - 0.5 - h**2 / 2, rtol=1e-6, atol=1e-6)


# --- the exact solution of Gaussian data -------------------------------------------------------------------------------

MEAN, STD = 0.5, 0.6  # of the data


def continuous(prediction: str) -> ObjectiveConfig:
    """The usual process cut into 50,000 times, between which a solver's steps are free to fall."""
    cuts = 50_000
    return ObjectiveConfig("diffusion", num_timesteps=cuts, beta_start=0.1 / cuts, beta_end=20.0 / cuts, prediction=prediction)


NOISE_OF_CONTINUOUS, V_OF_CONTINUOUS = continuous("noise"), continuous("v")
ALPHA_BAR = GaussianDiffusion(NOISE_OF_CONTINUOUS).alpha_bar


def path(objective: ObjectiveConfig, t: float) -> tuple[float, float]:
    """x_t = α·x₀ + σ·ε: α and σ."""
    if objective.kind == "flow":
        return 1 - t, t
    alpha_bar = float(ALPHA_BAR[int(t)])
    return math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)


def exact_network(objective: ObjectiveConfig, t: float) -> tuple[float, float]:
    """The best prediction from x_t is gain·x_t + offset."""
    alpha, sigma = path(objective, t)
    variance = alpha**2 * STD**2 + sigma**2
    noise, x0 = sigma / variance, alpha * STD**2 / variance  # slopes of E[ε|x_t] and E[x₀|x_t], whose means are 0 and MEAN
    weights = {"flow": (1.0, -1.0), "noise": (1.0, 0.0), "v": (alpha, -sigma)}
    of_noise, of_x0 = weights["flow" if objective.kind == "flow" else objective.prediction]
    gain = of_noise * noise + of_x0 * x0
    return gain, of_x0 * MEAN - gain * alpha * MEAN


def moments(objective: ObjectiveConfig, table: SamplerTable) -> tuple[float, float]:
    """Mean and deviation that the sampler gives the pictures, without drawing any: every row is linear in the state.

    They start as those of the true x_t, so that the exact ends of the ordinary and of the stochastic equation are both the data's own.
    """
    alpha, sigma = path(objective, float(table.t[0]))
    mean, covariance = torch.zeros(table.states).double(), torch.zeros(table.states, table.states).double()
    mean[0], covariance[0, 0] = alpha * MEAN, alpha**2 * STD**2 + sigma**2
    added = (table.d**2 * torch.exp(table.log_variance_low)).tolist()
    for t, a, b, variance in zip(table.t.tolist(), table.a, table.b, added, strict=True):
        gain, offset = exact_network(objective, t)
        step = a.clone()
        step[:, 0] += b * gain
        mean, covariance = step @ mean + b * offset, step @ covariance @ step.T
        covariance[0, 0] += variance
    return float(mean[0]), math.sqrt(float(covariance[0, 0]))


def error(objective: ObjectiveConfig, sampler: str, steps: int) -> float:
    spacing = "log-snr" if objective.kind == "diffusion" else None
    mean, std = moments(objective, build_table(objective, sampler, steps, spacing=spacing))
    return abs(mean - MEAN) + abs(std - STD)


ORDERS = {
    "ddim": 1,
    "ddpm-small": 1,
    "ddpm-large": 1,
    "dpm-solver++": 2,
    "sde-dpm-solver++": 2,
    "euler": 1,
    "heun": 2,
    "ab2": 2,
}


@pytest.mark.parametrize("sampler", ORDERS)
def test_the_error_on_gaussian_data_falls_at_the_order_that_the_solver_claims(sampler: str) -> None:
    objective = FLOW if sampler in SAMPLERS["flow"] else NOISE_OF_CONTINUOUS
    errors = [error(objective, sampler, steps) for steps in (20, 40, 80, 160)]
    assert errors == sorted(errors, reverse=True)
    orders = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors[1:])]
    assert orders == pytest.approx([ORDERS[sampler]] * 2, abs=0.25), errors


@pytest.mark.parametrize("sampler", [name for name in ORDERS if name not in SAMPLERS["flow"]])
def test_the_error_is_the_same_whether_the_network_predicts_noise_or_v(sampler: str) -> None:
    one, other = (error(objective, sampler, 40) for objective in (NOISE_OF_CONTINUOUS, V_OF_CONTINUOUS))
    assert one == pytest.approx(other, rel=1e-6)


@pytest.mark.parametrize("sampler", [name for name in ORDERS if name not in SAMPLERS["flow"]])
@pytest.mark.parametrize("spacing", ["paper", "trailing"])
def test_many_steps_of_any_spacing_come_close_to_the_data(sampler: str, spacing: str) -> None:
    mean, std = moments(NOISE_OF_CONTINUOUS, build_table(NOISE_OF_CONTINUOUS, sampler, 640, spacing=spacing))
    assert (mean, std) == pytest.approx((MEAN, STD), abs=0.01)


# --- the clean latent --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("objective", "name"), [*EVERY_SAMPLER, *((V, name) for name in SAMPLERS["diffusion"])])
def test_a_row_tells_the_clean_latent_that_the_network_sees(objective: ObjectiveConfig, name: str) -> None:
    """x at a row's own time, made of a clean latent and noise, and the true answer give that latent back."""
    table = build_table(objective, name, 7)
    clean, noise = draw(5), draw(2, 5)[1]
    for t, (p, q) in zip(table.t, table.clean, strict=True):
        if objective.kind == "flow":
            x, out = (1 - t) * clean + t * noise, noise - clean
        else:
            alpha_bar = GaussianDiffusion(objective).alpha_bar[int(t)]
            alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
            x, out = alpha * clean + sigma * noise, noise if objective.prediction == "noise" else alpha * noise - sigma * clean
        assert torch.allclose(p * x + q * out, clean, atol=1e-9)
