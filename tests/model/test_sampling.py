"""Samplers: each table against its formula, exact cases with known answers, and mixed batches."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from model.checkpoint import Checkpoint
from model.config import ObjectiveConfig
from model.diffusion import GaussianDiffusion
from model.noise import normal
from model.sampling import (
    SamplerTable,
    available_samplers,
    build_table,
    guide,
    max_steps,
    paper_timesteps,
    sample,
    sample_latents,
    to_pixels,
    update,
)

DIFFUSION, FLOW = ObjectiveConfig("diffusion"), ObjectiveConfig("flow")
EVERY_SAMPLER = [(DIFFUSION, "ddpm"), (DIFFUSION, "ddim"), (FLOW, "euler")]
SAMPLER_IDS = ["ddpm", "ddim", "euler"]
SHAPE = (4, 4, 4)


def start(rows: int = 4, seed: int = 100) -> tuple[Tensor, Tensor]:
    """Seeds (B,) and their initial noise (B, C, H, W)."""
    seeds = torch.arange(rows) + seed
    return seeds, normal(seeds, torch.zeros_like(seeds), SHAPE)


def alpha_bar_at(t: Tensor) -> Tensor:
    return GaussianDiffusion(DIFFUSION).alpha_bar[t.long()].to(torch.float32).view(-1, 1, 1, 1)


def run(objective: ObjectiveConfig, sampler: str, steps: int, network: Callable[[Tensor, Tensor, Tensor], Tensor], rows: int = 4) -> Tensor:
    seeds, latents = start(rows)
    table = build_table(objective, sampler, steps)
    return sample_latents(network, latents, torch.zeros(rows, dtype=torch.int64), 10, table, seeds=seeds)


# --- which evaluations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [2, 3, 7, 25, 250, 999, 1000])
def test_timesteps_are_distinct_and_reach_both_ends(steps: int) -> None:
    times = paper_timesteps(1000, steps)
    assert times[0] == 0 and times[-1] == 999 and len(set(times)) == steps and times == sorted(times)
    stride = 999 / (steps - 1)
    assert all(abs(t - i * stride) <= 0.5 + 1e-9 for i, t in enumerate(times))


def test_respacing_lists_the_papers_timesteps() -> None:
    assert paper_timesteps(1000, 1) == [999]
    assert paper_timesteps(1000, 1000) == list(range(1000))
    assert paper_timesteps(1000, 5) == [0, 250, 500, 749, 999]  # 499.5 rounds to even, as Python and the official code do
    assert build_table(DIFFUSION, "ddim", 5).t.tolist() == [999, 749, 500, 250, 0]
    assert build_table(FLOW, "euler", 4).t.tolist() == [1.0, 0.75, 0.5, 0.25]


@pytest.mark.parametrize(("objective", "sampler"), EVERY_SAMPLER, ids=SAMPLER_IDS)
@pytest.mark.parametrize("steps", [1, 2, 10, 1000])
def test_a_table_has_one_finite_row_per_evaluation(objective: ObjectiveConfig, sampler: str, steps: int) -> None:
    table = build_table(objective, sampler, steps)
    assert table.evaluations == steps and table.a.shape == (steps, 1, 1) and table.b.shape == (steps, 1)
    for values in (table.t, table.fraction, table.a, table.b, table.d, table.log_variance_low, table.log_variance_high):
        assert len(values) == steps and values.dtype == torch.float64 and bool(torch.isfinite(values).all())
    assert float(table.fraction.min()) >= 0 and float(table.fraction.max()) <= 1
    assert table.fraction.tolist() == sorted(table.fraction.tolist(), reverse=True) and table.fraction[0] == 1
    assert table.d[-1] == 0  # the last evaluation adds no noise


def test_errors_name_what_is_allowed() -> None:
    with pytest.raises(ValueError, match=r"'euler' does not fit .*diffusion.*ddpm, ddim"):
        build_table(DIFFUSION, "euler", 10)
    with pytest.raises(ValueError, match=r"'ddim' does not fit .*flow.*euler"):
        build_table(FLOW, "ddim", 10)
    with pytest.raises(ValueError, match=r"'ddpm' does not fit .*: ddim$"):
        build_table(DIFFUSION, "ddpm", 10, learn_sigma=False)
    for steps in (0, -1, 1001):
        with pytest.raises(ValueError, match=f"steps must be between 1 and 1000, got {steps}"):
            build_table(FLOW, "euler", steps)
    with pytest.raises(ValueError, match="between 1 and 50, got 51"):
        build_table(ObjectiveConfig("diffusion", num_timesteps=50), "ddim", 51)


def test_ddpm_is_offered_where_the_covariance_is_learned() -> None:
    assert available_samplers(DIFFUSION, learn_sigma=True) == ["ddpm", "ddim"]
    assert available_samplers(DIFFUSION, learn_sigma=False) == ["ddim"]
    assert available_samplers(FLOW, learn_sigma=False) == ["euler"]
    assert max_steps(ObjectiveConfig("diffusion", num_timesteps=50)) == 50 and max_steps(FLOW) == 1000


# --- each step against its formula -------------------------------------------------------------------------------------


def apply_row(table: SamplerTable, i: int, x: Tensor, out: Tensor, noise: Tensor) -> Tensor:
    numbers = (table.a, table.b, table.d, table.log_variance_low, table.log_variance_high)
    return update(x[:, None], out, *(v[i].to(x.dtype).expand(len(x), *v.shape[1:]) for v in numbers), noise)[:, 0]


@pytest.mark.parametrize("t", [999, 998, 500, 2, 1, 0])
def test_a_ddpm_row_is_the_reference_reverse_step(t: int) -> None:
    torch.manual_seed(t)
    x, noise, out = torch.randn(3, *SHAPE), torch.randn(3, *SHAPE), torch.randn(3, 8, 4, 4)
    mean, log_variance, _ = GaussianDiffusion(DIFFUSION).p_mean_variance(out, x, torch.full((3,), t))
    expected = mean + (t > 0) * torch.exp(log_variance / 2) * noise
    table = build_table(DIFFUSION, "ddpm", 1000)
    assert table.t[999 - t] == t
    torch.testing.assert_close(apply_row(table, 999 - t, x, out, noise), expected, rtol=1e-4, atol=1e-4)


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


def test_a_ddim_row_is_equation_12() -> None:
    table, alpha_bar = build_table(DIFFUSION, "ddim", 10), GaussianDiffusion(DIFFUSION).alpha_bar
    x, out = torch.randn(2, *SHAPE).double(), torch.randn(2, 8, 4, 4).double()
    for i, (now, following) in enumerate(zip(table.t.long(), [*table.t.long()[1:], None], strict=True)):
        alpha = alpha_bar[now]
        alpha_next = alpha_bar[following] if following is not None else torch.tensor(1.0).double()
        x0 = (x - (1 - alpha).sqrt() * out[:, :4]) / alpha.sqrt()
        expected = alpha_next.sqrt() * x0 + (1 - alpha_next).sqrt() * out[:, :4]
        torch.testing.assert_close(apply_row(table, i, x, out, torch.randn_like(x)), expected)


# --- exact answers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
@pytest.mark.parametrize(("objective", "sampler"), EVERY_SAMPLER, ids=SAMPLER_IDS)
def test_a_point_mass_is_reached_from_every_start(objective: ObjectiveConfig, sampler: str, steps: int) -> None:
    point = torch.linspace(-1, 1, 64).view(1, *SHAPE)

    def exact(x: Tensor, t: Tensor, _: Tensor) -> Tensor:
        if objective.kind == "flow":
            return (x - point) / t.view(-1, 1, 1, 1)
        alpha = alpha_bar_at(t)
        noise = (x - alpha.sqrt() * point) / (1 - alpha).sqrt()
        return torch.cat([noise, torch.zeros_like(noise)], dim=1)

    latents = run(objective, sampler, steps, exact)
    torch.testing.assert_close(latents, point.expand_as(latents), rtol=0, atol=2e-4)


MEAN, STD = 0.5, 0.6  # of Gaussian data, for which the exact network is linear


def exact_gaussian_network(objective: ObjectiveConfig) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def network(x: Tensor, t: Tensor, _: Tensor) -> Tensor:
        if objective.kind == "flow":
            t = t.view(-1, 1, 1, 1)
            centred = (x - (1 - t) * MEAN) / ((1 - t) ** 2 * STD**2 + t**2)
            return t * centred - MEAN - (1 - t) * STD**2 * centred  # E[ε − x₀ | x_t]
        alpha = alpha_bar_at(t)
        return (1 - alpha).sqrt() * (x - alpha.sqrt() * MEAN) / (alpha * STD**2 + 1 - alpha)  # E[ε | x_t]

    return network


@pytest.mark.parametrize(("objective", "sampler"), EVERY_SAMPLER[1:], ids=SAMPLER_IDS[1:])
def test_error_on_gaussian_data_falls_with_the_steps(objective: ObjectiveConfig, sampler: str) -> None:
    """The probability-flow ODE of Gaussian data keeps quantiles, so every start has a known end."""
    _, x = start()
    if objective.kind == "flow":
        exact = MEAN + STD * x
    else:
        alpha = float(GaussianDiffusion(DIFFUSION).alpha_bar[-1])
        exact = MEAN + STD * (x - math.sqrt(alpha) * MEAN) / math.sqrt(alpha * STD**2 + 1 - alpha)
    errors = [float((run(objective, sampler, n, exact_gaussian_network(objective)) - exact).abs().max()) for n in (8, 16, 32, 64)]
    for coarse, fine in itertools.pairwise(errors):
        assert 1.6 < coarse / fine < 2.6, errors  # first order: half the step, half the error


def test_ddpm_samples_gaussian_data_with_its_moments() -> None:
    network = exact_gaussian_network(DIFFUSION)

    def with_covariance(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return torch.cat([network(x, t, y), torch.zeros_like(x)], dim=1)

    latents = run(DIFFUSION, "ddpm", 200, with_covariance, rows=128)  # 8,192 numbers
    assert float(latents.mean()) == pytest.approx(MEAN, abs=0.03) and float(latents.std()) == pytest.approx(STD, abs=0.03)


def test_ddpm_is_the_reference_loop_with_the_noise_of_each_evaluation() -> None:
    """Every step by `p_mean_variance`; evaluation 0 is the initial latent, evaluation k + 1 the noise after the k-th network call."""
    objective, steps = ObjectiveConfig("diffusion", num_timesteps=6), 6
    diffusion, (seeds, x) = GaussianDiffusion(objective), start()

    def network(x: Tensor, t: Tensor, _: Tensor) -> Tensor:
        return torch.cat([x.sin(), x.cos()], dim=1) * (1 + t.view(-1, 1, 1, 1) / 10)

    for k, t in enumerate(reversed(range(steps))):
        time = torch.full((4,), t)
        mean, log_variance, _ = diffusion.p_mean_variance(network(x, time, time), x, time)
        x = mean + (t > 0) * torch.exp(log_variance / 2) * normal(seeds, torch.full_like(seeds, k + 1), SHAPE)
    torch.testing.assert_close(run(objective, "ddpm", steps, network), x, rtol=1e-4, atol=1e-4)


# --- guidance ----------------------------------------------------------------------------------------------------------


def test_guidance_leaves_the_covariance_to_the_conditional_row() -> None:
    conditional, unconditional = torch.randn(2, 8, 3, 3), torch.randn(2, 8, 3, 3)
    guided = guide(conditional, unconditional, 3.0, channels=4)
    torch.testing.assert_close(guided[:, :4], 3 * conditional[:, :4] - 2 * unconditional[:, :4])
    assert torch.equal(guided[:, 4:], conditional[:, 4:])


def test_guidance_takes_a_scale_per_row() -> None:
    conditional, unconditional, scale = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([1.0, 2.5, 7.0])
    together = guide(conditional, unconditional, scale.view(3, 1, 1, 1), channels=4)
    for i in range(3):
        assert torch.equal(together[i : i + 1], guide(conditional[i : i + 1], unconditional[i : i + 1], float(scale[i]), 4))


def test_guidance_of_one_asks_for_the_conditional_only() -> None:
    asked: list[Tensor] = []

    def network(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        asked.append(y)
        return x * y.view(-1, 1, 1, 1)

    seeds, latents = start(2)
    table = build_table(FLOW, "euler", 2)
    plain = sample_latents(network, latents, torch.tensor([1, 2]), 10, table, guidance_scale=1.0, seeds=seeds)
    assert [y.tolist() for y in asked] == [[1, 2]] * 2
    asked.clear()
    near = sample_latents(network, latents, torch.tensor([1, 2]), 10, table, guidance_scale=1.0 + 1e-6, seeds=seeds)
    assert [y.tolist() for y in asked] == [[1, 2, 10, 10]] * 2
    torch.testing.assert_close(near, plain, rtol=1e-4, atol=1e-4)


# --- mixed batches -----------------------------------------------------------------------------------------------------


def mixed_rows(objective: ObjectiveConfig, out_channels: int) -> list[tuple[Tensor, ...]]:
    """Arguments of `update` for rows of every sampler of the objective, at different steps of different counts."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for name in (n for o, n in EVERY_SAMPLER if o == objective):
        for steps, i in ((1, 0), (7, 0), (7, 6), (50, 13), (250, 249)):
            table = build_table(objective, name, steps)
            numbers = (table.a, table.b, table.d, table.log_variance_low, table.log_variance_high)
            state, out, noise = (torch.randn(s, generator=generator) for s in ((1, 1, *SHAPE), (1, out_channels, 4, 4), (1, *SHAPE)))
            rows.append((state, out, *(v[i : i + 1].float() for v in numbers), noise))
    return rows


@pytest.mark.parametrize(("objective", "out_channels"), [(DIFFUSION, 8), (FLOW, 4)], ids=["diffusion", "flow"])
def test_rows_of_different_tables_step_together_as_each_alone(objective: ObjectiveConfig, out_channels: int) -> None:
    rows = mixed_rows(objective, out_channels)
    together = update(*(torch.cat(column) for column in zip(*rows, strict=True)))
    for i, row in enumerate(rows):
        assert torch.equal(update(*row)[0], together[i])


def test_a_sampler_may_remember_several_latents() -> None:
    """K = 2: the state's matrix mixes what the solver keeps, and b says where the new output goes."""
    state, out = torch.randn(2, 2, *SHAPE), torch.randn(2, *SHAPE)
    a = torch.tensor([[[0.5, 2.0], [0.0, 0.0]], [[1.0, -1.0], [3.0, 0.25]]])
    b, zero = torch.tensor([[0.1, 1.0], [0.0, 2.0]]), torch.zeros(2)
    new = update(state, out, a, b, zero, zero, zero, torch.randn(2, *SHAPE))
    expected = torch.einsum("bjk,bkchw->bjchw", a, state) + b[:, :, None, None, None] * out[:, None]
    torch.testing.assert_close(new, expected)


# --- the reference loop ------------------------------------------------------------------------------------------------


def test_each_picture_depends_on_its_seed_and_class_alone(build_checkpoint: Callable[..., Checkpoint]) -> None:
    """Four rows or more: below that the CPU's kernels give other bits (DESIGN.md), and the worker pads."""
    checkpoint = build_checkpoint("flow")
    settings = {"steps": 3, "guidance_scale": 2.0, "sampler": "euler"}
    large = 2**53 - 1
    pictures = sample(checkpoint, [0, 1, None, 3], seeds=[5, large, 7, 8], **settings)
    assert torch.equal(sample(checkpoint, [0, 1, None, 3], seeds=[5, large, 7, 8], **settings), pictures)
    others = sample(checkpoint, [2, 3, 1, None, 0, 1], seeds=[1, 8, large, 7, 5, 11], **settings)
    assert torch.equal(others[[4, 2, 3, 1]], pictures)
    assert len({p.numpy().tobytes() for p in others}) == 6


@pytest.mark.parametrize(("objective", "sampler"), [("diffusion", "ddpm"), ("diffusion", "ddim"), ("flow", "euler")], ids=SAMPLER_IDS)
def test_pictures_are_bytes_of_the_models_size(build_checkpoint: Callable[..., Checkpoint], objective: str, sampler: str) -> None:
    pictures = sample(build_checkpoint(objective), [0, None], steps=2, guidance_scale=1.5, sampler=sampler, seeds=[1, 2])
    assert pictures.shape == (2, 16, 16, 1) and pictures.dtype == torch.uint8 and float(pictures.float().std()) > 5


def test_unconditional_ignores_guidance(build_checkpoint: Callable[..., Checkpoint]) -> None:
    """Both halves are the null class, so any scale gives their common output."""
    checkpoint = build_checkpoint("flow")
    one, four = (
        sample(checkpoint, [None] * 4, steps=3, guidance_scale=scale, sampler="euler", seeds=[1, 2, 3, 4]).int() for scale in (1.0, 4.0)
    )
    assert int((one - four).abs().max()) <= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_labels": [0, 4]}, "class labels are 0 … 3 or None, got 4"),
        ({"class_labels": [-1, 0]}, "got -1"),
        ({"seeds": [1]}, "2 class labels but 1 seeds"),
        ({"sampler": "ddim"}, "euler"),
        ({"steps": 0}, "between 1 and 1000, got 0"),
    ],
)
def test_sample_refuses_what_it_cannot_do(build_checkpoint: Callable[..., Checkpoint], changes: dict[str, object], message: str) -> None:
    arguments = {"class_labels": [0, 1], "seeds": [1, 2], "steps": 2, "guidance_scale": 1.0, "sampler": "euler"}
    with pytest.raises(ValueError, match=message):
        sample(build_checkpoint("flow"), **{**arguments, **changes})


def test_ancestral_sampling_is_refused_without_a_learned_covariance(build_checkpoint: Callable[..., Checkpoint]) -> None:
    checkpoint = build_checkpoint("diffusion", learn_sigma=False)
    settings = {"steps": 2, "guidance_scale": 1.0, "seeds": [1, 2]}
    assert len(sample(checkpoint, [0, 1], sampler="ddim", **settings)) == 2
    with pytest.raises(ValueError, match=r"'ddpm'.*ddim"):
        sample(checkpoint, [0, 1], sampler="ddpm", **settings)


def test_a_checkpoint_without_a_decoder_makes_no_pictures(build_checkpoint: Callable[..., Checkpoint]) -> None:
    checkpoint = build_checkpoint("flow")
    checkpoint.vae = None
    with pytest.raises(ValueError, match="no VAE"):
        sample(checkpoint, [0], steps=1, guidance_scale=1.0, sampler="euler", seeds=[0])


def test_pixels_are_rounded_and_clamped() -> None:
    images = torch.tensor([-3.0, -1.0, 0.0, 0.5, 1.0, 3.0]).view(1, 1, 2, 3)
    assert to_pixels(images).flatten().tolist() == [0, 0, 128, 191, 255, 255]  # 127.5 rounds to even
    assert to_pixels(torch.zeros(2, 3, 4, 5)).shape == (2, 4, 5, 3)
