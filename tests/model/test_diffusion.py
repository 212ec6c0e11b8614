"""The Gaussian process against algebra that knows nothing of its formulas."""

import math

import pytest
import torch

from model.config import ObjectiveConfig
from model.diffusion import GaussianDiffusion, discretised_log_likelihood, normal_kl


@pytest.fixture(scope="module")
def diffusion() -> GaussianDiffusion:
    return GaussianDiffusion(ObjectiveConfig("diffusion"))


def test_a_diffusion_needs_the_diffusion_objective() -> None:
    with pytest.raises(ValueError, match="'diffusion', got 'flow'"):
        GaussianDiffusion(ObjectiveConfig("flow"))


def test_the_schedule_runs_linearly_from_clean_to_noise(diffusion: GaussianDiffusion) -> None:
    assert diffusion.betas[[0, 999]].tolist() == pytest.approx([1e-4, 2e-2], abs=1e-15)
    assert float(diffusion.betas.diff().std()) < 1e-15
    assert diffusion.alpha_bar[0] == 1 - 1e-4 and float(diffusion.alpha_bar[-1]) < 5e-5


def test_q_sample_composes_single_steps(diffusion: GaussianDiffusion) -> None:
    """Mean and variance of x_t by T applications of N(√(1−β)·x, β)."""
    mean, variance = 1.0, 0.0
    for t in range(1000):
        beta = float(diffusion.betas[t])
        mean, variance = mean * math.sqrt(1 - beta), variance * (1 - beta) + beta
        if t in (0, 1, 300, 999):
            time = torch.tensor([t])
            one, zero = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
            assert float(diffusion.q_sample(one, time, zero)) == pytest.approx(mean, rel=1e-9)
            assert float(diffusion.q_sample(zero, time, one)) ** 2 == pytest.approx(variance, rel=1e-9)


@pytest.mark.parametrize("t", [1, 2, 300, 999])
def test_the_posterior_is_bayes_rule(diffusion: GaussianDiffusion, t: int) -> None:
    """(x_{t−1}, x_t) given x_0 are jointly Gaussian; condition the first on the second by the covariance formula."""
    x0, xt = 0.7, -1.3
    beta, previous = float(diffusion.betas[t]), float(diffusion.alpha_bar[t - 1])
    mean_previous, variance_previous = math.sqrt(previous) * x0, 1 - previous
    covariance = math.sqrt(1 - beta) * variance_previous
    variance_t = (1 - beta) * variance_previous + beta
    mean = mean_previous + covariance / variance_t * (xt - math.sqrt(1 - beta) * mean_previous)
    variance = variance_previous - covariance**2 / variance_t
    ours = diffusion.q_posterior(*(torch.full((1, 1, 1, 1), v, dtype=torch.float64) for v in (x0, xt)), torch.tensor([t]))
    assert float(ours[0]) == pytest.approx(mean, rel=1e-9)
    assert float(ours[1]) == pytest.approx(math.log(variance), rel=1e-9)


def test_the_posterior_at_zero_is_the_clean_latent_with_a_finite_variance(diffusion: GaussianDiffusion) -> None:
    x0, xt, t = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3), torch.tensor([0, 0])
    mean, log_variance = diffusion.q_posterior(x0, xt, t)
    torch.testing.assert_close(mean, x0)
    torch.testing.assert_close(log_variance, diffusion.q_posterior(x0, xt, t + 1)[1])


def test_predict_x0_inverts_q_sample(diffusion: GaussianDiffusion) -> None:
    x0, noise, t = torch.randn(4, 4, 3, 3).double(), torch.randn(4, 4, 3, 3).double(), torch.tensor([0, 10, 500, 999])
    torch.testing.assert_close(diffusion.predict_x0(diffusion.q_sample(x0, t, noise), t, noise), x0)


def test_v_moves_the_variance_between_its_bounds(diffusion: GaussianDiffusion) -> None:
    xt, t = torch.zeros(2, 4, 1, 1).double(), torch.tensor([10, 900])
    for v, bound in ((1.0, diffusion.betas.log()), (-1.0, diffusion.posterior_log_variance)):
        out = torch.cat([torch.zeros_like(xt), torch.full_like(xt, v)], dim=1)
        log_variance = diffusion.p_mean_variance(out, xt, t)[1]
        torch.testing.assert_close(log_variance, bound[t].view(2, 1, 1, 1).expand_as(log_variance))


def test_kl_is_that_of_torch() -> None:
    torch.manual_seed(0)
    a, b, c, d = torch.randn(4, 50).double()
    p = torch.distributions.Normal(a, torch.exp(b / 2))
    q = torch.distributions.Normal(c, torch.exp(d / 2))
    torch.testing.assert_close(normal_kl(a, b, c, d), torch.distributions.kl_divergence(p, q))
    assert torch.equal(normal_kl(a, b, a, b), torch.zeros(50).double())


@pytest.mark.parametrize("log_scale", [-5.0, -2.0, 0.0])
def test_the_discretised_likelihood_is_a_probability_over_grey_levels(log_scale: float) -> None:
    levels = torch.arange(256).double() / 127.5 - 1
    log_p = discretised_log_likelihood(levels, torch.tensor(0.2).double(), torch.tensor(log_scale).double())
    assert float(log_p.exp().sum()) == pytest.approx(1, abs=1e-9)
    middle = slice(1, 255)  # the outer bins reach to infinity
    normal = torch.distributions.Normal(0.2, math.exp(log_scale))
    exact = normal.cdf(levels + 1 / 255) - normal.cdf(levels - 1 / 255)
    assert float((log_p.exp() - exact)[middle].abs().max()) < 1e-3


def test_a_perfect_prediction_has_no_bound_left(diffusion: GaussianDiffusion) -> None:
    x0, noise, t = torch.rand(3, 4, 3, 3) * 2 - 1, torch.randn(3, 4, 3, 3), torch.tensor([1, 300, 999])
    out = torch.cat([noise, torch.full_like(noise, -1.0)], dim=1)  # v = −1: the posterior's own variance
    losses = diffusion.losses(out, x0, diffusion.q_sample(x0, t, noise), t, noise)
    assert float(losses["mse"].abs().max()) == 0
    assert float(losses["vb"].abs().max()) < 1e-5


@pytest.mark.parametrize("t", [0, 1, 500])
def test_the_bound_trains_the_covariance_and_not_the_mean(diffusion: GaussianDiffusion, t: int) -> None:
    torch.manual_seed(0)
    x0, noise, time = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3), torch.tensor([t, t])
    out = torch.randn(2, 8, 3, 3, requires_grad=True)
    losses = diffusion.losses(out, x0, diffusion.q_sample(x0, time, noise), time, noise)
    losses["vb"].sum().backward(retain_graph=True)
    assert torch.count_nonzero(out.grad[:, :4]) == 0 and torch.count_nonzero(out.grad[:, 4:]) > 0
    out.grad = None
    losses["mse"].sum().backward()
    assert torch.count_nonzero(out.grad[:, :4]) > 0 and torch.count_nonzero(out.grad[:, 4:]) == 0


def test_losses_are_per_row(diffusion: GaussianDiffusion) -> None:
    torch.manual_seed(0)
    out, x0, noise, t = torch.randn(3, 8, 3, 3), torch.randn(3, 4, 3, 3), torch.randn(3, 4, 3, 3), torch.tensor([0, 5, 999])
    xt = diffusion.q_sample(x0, t, noise)
    together = diffusion.losses(out, x0, xt, t, noise)
    for i in range(3):
        alone = diffusion.losses(out[i : i + 1], x0[i : i + 1], xt[i : i + 1], t[i : i + 1], noise[i : i + 1])
        for name in ("mse", "vb", "loss"):
            torch.testing.assert_close(alone[name][0], together[name][i])


def test_the_bound_is_weighted_by_the_number_of_steps() -> None:
    """One of T terms stands for all (×T), and the paper weighs the bound by 1/1000."""
    short = GaussianDiffusion(ObjectiveConfig("diffusion", num_timesteps=100))
    torch.manual_seed(0)
    out, x0, noise, t = torch.randn(2, 8, 3, 3), torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3), torch.tensor([3, 90])
    xt = short.q_sample(x0, t, noise)
    torch.testing.assert_close(short.losses(out, x0, xt, t, noise)["vb"], short.vlb_bits(out, x0, xt, t) / 10)
