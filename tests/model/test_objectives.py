"""Every objective against denoisers whose loss is known in closed form, by formulas written here in plain Python (float64)."""

import math
from statistics import NormalDist

import pytest
import torch
from torch import Tensor

from model.config import ObjectiveConfig
from model.diffusion import GaussianDiffusion
from model.flow import RectifiedFlow

T = 1000
TIMES = (0, 1, 250, 700, T - 1)
PREDICTIONS = ("noise", "v")


def alpha_bar(t: int) -> float:
    """Π(1 − β) for the linear betas of the paper; alpha_bar(−1) is 1."""
    return math.prod(1 - (1e-4 + (2e-2 - 1e-4) * s / (T - 1)) for s in range(t + 1))


def weight(prediction: str, gamma: float, t: int) -> float:
    """min-SNR-γ (Hang et al. 2023): min(SNR, γ) on x₀'s error, by what an error of the prediction is worth in x₀'s."""
    if gamma == 0:
        return 1.0
    snr = alpha_bar(t) / (1 - alpha_bar(t))
    return min(snr, gamma) / (snr if prediction == "noise" else snr + 1)


def diffusion(prediction: str = "noise", gamma: float = 0.0) -> GaussianDiffusion:
    return GaussianDiffusion(ObjectiveConfig("diffusion", prediction=prediction, min_snr_gamma=gamma))


def rows(shape: tuple[int, ...] = (4, 3, 3)) -> tuple[Tensor, Tensor, Tensor]:
    """Clean latents, noise and time, one row per time of TIMES."""
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(len(TIMES), *shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return x0, noise, torch.tensor(TIMES)


def true_target(prediction: str, x0: Tensor, noise: Tensor) -> Tensor:
    if prediction == "noise":
        return noise
    return torch.stack([math.sqrt(alpha_bar(t)) * noise[i] - math.sqrt(1 - alpha_bar(t)) * x0[i] for i, t in enumerate(TIMES)])


def with_covariance(predicted: Tensor, value: float) -> Tensor:
    return torch.cat([predicted, torch.full_like(predicted, value)], dim=1)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("gamma", [0.0, 5.0])
@pytest.mark.parametrize("error", [0.0, 0.3, -2.0])
def test_a_diffusion_network_that_is_off_by_a_constant_has_its_square_as_the_loss(prediction: str, gamma: float, error: float) -> None:
    process, (x0, noise, t) = diffusion(prediction, gamma), rows()
    losses = process.losses(true_target(prediction, x0, noise) + error, x0, process.q_sample(x0, t, noise), t, noise)
    assert losses.keys() == {"mse", "loss"}  # C channels: nothing but the squared error
    assert losses["mse"].tolist() == pytest.approx([error**2] * len(TIMES), rel=1e-9, abs=1e-24)
    assert losses["loss"].tolist() == pytest.approx([weight(prediction, gamma, s) * error**2 for s in TIMES], rel=1e-9, abs=1e-24)


@pytest.mark.parametrize("flow_time", ["uniform", "logit-normal"])
@pytest.mark.parametrize("error", [0.0, 0.3, -2.0])
def test_a_flow_network_that_is_off_by_a_constant_has_its_square_as_the_loss(flow_time: str, error: float) -> None:
    process, (x0, noise, _) = RectifiedFlow(ObjectiveConfig("flow", flow_time=flow_time)), rows()
    t = torch.linspace(0, 1, len(x0), dtype=torch.float64)
    losses = process.losses(noise - x0 + error, x0, process.q_sample(x0, t, noise), t, noise)
    assert losses["loss"].tolist() == pytest.approx([error**2] * len(x0), rel=1e-9, abs=1e-24)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("covariance", [-1.0, 0.0, 0.4])
def test_the_bound_of_a_network_that_is_off_by_a_constant_is_a_kl_of_two_normals(prediction: str, covariance: float) -> None:
    """N(μ, β̃) against N(μ + δ, σ²) with δ the error times what it moves the mean by, and log σ² between log β̃ and log β."""
    error, process, (x0, noise, t) = 0.3, diffusion(prediction), rows()
    out = with_covariance(true_target(prediction, x0, noise) + error, covariance)
    losses = process.losses(out, x0, process.q_sample(x0, t, noise), t, noise)
    for i, s in enumerate(TIMES):
        if s == 0:
            continue  # no KL there: see the next test
        now, before = alpha_bar(s), alpha_bar(s - 1)
        beta = 1 - now / before
        small = beta * (1 - before) / (1 - now)
        variance = math.exp((1 + covariance) / 2 * math.log(beta) + (1 - covariance) / 2 * math.log(small))
        x0_error = error * (math.sqrt(1 / now - 1) if prediction == "noise" else math.sqrt(1 - now))
        delta = x0_error * beta * math.sqrt(before) / (1 - now)
        kl = 0.5 * (math.log(variance / small) - 1 + small / variance + delta**2 / variance)
        assert float(losses["vb"][i]) == pytest.approx(kl / math.log(2), rel=1e-7, abs=1e-12)
    assert torch.equal(losses["loss"], losses["mse"] + losses["vb"])


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_bound_at_zero_is_the_likelihood_of_a_grey_level(prediction: str) -> None:
    """A network that knows the target has mean x₀ there; its bin of ±1/255 holds erf(1/(255·σ·√2)) of the normal."""
    process, (x0, noise, t) = diffusion(prediction), rows()
    x0 = x0.clamp(-0.9, 0.9)
    losses = process.losses(with_covariance(true_target(prediction, x0, noise), -1.0), x0, process.q_sample(x0, t, noise), t, noise)
    beta = 1 - alpha_bar(1) / alpha_bar(0)
    sigma = math.sqrt(beta * (1 - alpha_bar(0)) / (1 - alpha_bar(1)))  # β̃ of t = 1, for that of t = 0 is 0
    bits = -math.log2(math.erf(1 / 255 / sigma / math.sqrt(2)))
    assert TIMES[0] == 0 and float(losses["vb"][0]) == pytest.approx(bits, rel=1e-3)  # the code's normal is an approximation by tanh


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("gamma", [0.0, 5.0])
def test_a_diffusion_network_that_knows_nothing_loses_the_variance_of_its_target(prediction: str, gamma: float) -> None:
    """x₀ ~ N(m, s²): E ε² = 1, and E v² = ᾱ + (1−ᾱ)·(m² + s²)."""
    mean, std, process, (z, noise, t) = 0.5, 2.0, diffusion(prediction, gamma), rows((4, 256, 256))
    x0 = mean + std * z
    loss = process.losses(torch.zeros_like(x0), x0, process.q_sample(x0, t, noise), t, noise)["loss"]
    for i, s in enumerate(TIMES):
        square = 1.0 if prediction == "noise" else alpha_bar(s) + (1 - alpha_bar(s)) * (mean**2 + std**2)
        assert float(loss[i]) == pytest.approx(weight(prediction, gamma, s) * square, rel=0.015)


def test_a_flow_network_that_knows_nothing_loses_the_variance_of_the_velocity() -> None:
    """x₀ ~ N(m, s²): E (ε − x₀)² = 1 + m² + s², whatever the time."""
    mean, std, (z, noise, _) = 0.5, 2.0, rows((4, 256, 256))
    process, x0, t = RectifiedFlow(ObjectiveConfig("flow")), mean + std * z, torch.rand(len(z), dtype=torch.float64)
    loss = process.losses(torch.zeros_like(x0), x0, process.q_sample(x0, t, noise), t, noise)["loss"]
    assert loss.tolist() == pytest.approx([1 + mean**2 + std**2] * len(z), rel=0.015)


def one_denoiser() -> tuple[Tensor, dict[str, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]:
    """A guess of x₀, and the ε and v that say the same, with covariance 0.2; what they are guessed from."""
    x0, noise, t = rows()
    xt = diffusion().q_sample(x0, t, noise)
    guess = x0 + 0.1 * torch.randn(x0.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    alpha = torch.tensor([math.sqrt(alpha_bar(s)) for s in TIMES], dtype=torch.float64).view(-1, 1, 1, 1)
    sigma = torch.tensor([math.sqrt(1 - alpha_bar(s)) for s in TIMES], dtype=torch.float64).view(-1, 1, 1, 1)
    epsilon = (xt - alpha * guess) / sigma
    outputs = {"noise": with_covariance(epsilon, 0.2), "v": with_covariance(alpha * epsilon - sigma * guess, 0.2)}
    return guess, outputs, (x0, xt, t, noise)


def test_noise_and_v_networks_of_one_denoiser_agree_on_everything_they_imply() -> None:
    guess, outputs, (x0, xt, t, noise) = one_denoiser()
    of = {name: diffusion(name) for name in PREDICTIONS}
    for name, process in of.items():
        predicted = outputs[name][:, :4]
        torch.testing.assert_close(process.predict_x0(xt, t, predicted), guess, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(process.predict_noise(xt, t, predicted), outputs["noise"][:, :4], rtol=1e-9, atol=1e-9)
    for a, b in zip(*(of[name].p_mean_variance(outputs[name], xt, t) for name in PREDICTIONS), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    vb = [of[name].losses(outputs[name], x0, xt, t, noise)["vb"] for name in PREDICTIONS]
    torch.testing.assert_close(*vb, rtol=1e-7, atol=1e-9)


def test_min_snr_is_one_loss_of_x0_whatever_is_predicted() -> None:
    guess, outputs, (x0, xt, t, noise) = one_denoiser()
    error = (guess - x0).square().flatten(1).mean(1).tolist()
    expected = [min(alpha_bar(s) / (1 - alpha_bar(s)), 5.0) * e for s, e in zip(TIMES, error, strict=True)]
    for name in PREDICTIONS:
        losses = diffusion(name, 5.0).losses(outputs[name][:, :4], x0, xt, t, noise)
        assert losses["loss"].tolist() == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize(
    ("t", "snr", "of_noise", "of_v"),
    [
        (0, 9999.0, 5 / 9999, 5 / 10000),  # ᾱ = 0.9999
        (100, 8.5367, 5 / 8.5367, 5 / 9.5367),
        (250, 1.0895, 1.0, 1.0895 / 2.0895),  # below γ: the plain error of ε
        (999, 4.0360e-5, 1.0, 4.0358e-5),
    ],
)
def test_min_snr_weights_at_gamma_5(t: int, snr: float, of_noise: float, of_v: float) -> None:
    assert alpha_bar(t) / (1 - alpha_bar(t)) == pytest.approx(snr, rel=1e-4)
    assert float(diffusion("noise", 5.0).error_weight[t]) == pytest.approx(of_noise, rel=1e-4)
    assert float(diffusion("v", 5.0).error_weight[t]) == pytest.approx(of_v, rel=1e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_leaves_the_bound_and_the_reported_error_alone(prediction: str) -> None:
    _, outputs, (x0, xt, t, noise) = one_denoiser()
    plain, weighted = (diffusion(prediction, gamma).losses(outputs[prediction], x0, xt, t, noise) for gamma in (0.0, 5.0))
    assert torch.equal(plain["vb"], weighted["vb"]) and torch.equal(plain["mse"], weighted["mse"])
    torch.testing.assert_close(weighted["loss"] - weighted["vb"], diffusion(prediction, 5.0).error_weight[t] * plain["mse"])


@pytest.mark.parametrize("gamma", [0.0, 5.0])
def test_the_bound_trains_the_covariance_alone_with_v_prediction_too(gamma: float) -> None:
    x0, noise, t = rows()
    process, out = diffusion("v", gamma), torch.randn(len(TIMES), 8, 3, 3, dtype=torch.float64, requires_grad=True)
    losses = process.losses(out, x0, process.q_sample(x0, t, noise), t, noise)
    (of_bound,) = torch.autograd.grad(losses["vb"].sum(), out, retain_graph=True)
    (of_error,) = torch.autograd.grad(losses["mse"].sum(), out)
    assert not of_bound[:, :4].any() and of_bound[:, 4:].flatten(1).any(1).all()
    assert of_error[:, :4].flatten(1).any(1).all() and not of_error[:, 4:].any()


def quantiles(times: Tensor, at: list[float]) -> list[float]:
    return torch.quantile(times.double(), torch.tensor(at, dtype=torch.float64)).tolist()


def test_uniform_flow_times_cover_the_path_evenly() -> None:
    process = RectifiedFlow(ObjectiveConfig("flow", flow_time="uniform"))
    times = process.times(torch.rand(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    assert 0 < float(times.min()) < 1e-4 and 1 - 1e-4 < float(times.max()) <= 1
    at = [i / 20 for i in range(1, 20)]
    assert quantiles(times, at) == pytest.approx(at, abs=0.004)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.4, 1.2)])
def test_logit_normal_flow_times_have_the_quantiles_of_a_squashed_normal(mean: float, std: float) -> None:
    process = RectifiedFlow(ObjectiveConfig("flow", logit_normal_mean=mean, logit_normal_std=std))
    times = process.times(torch.rand(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    at = [0.02, 0.25, 0.5, 0.75, 0.98]
    assert quantiles(times, at) == pytest.approx([1 / (1 + math.exp(-NormalDist(mean, std).inv_cdf(q))) for q in at], abs=0.004)


def test_diffusion_times_are_every_step_equally_often() -> None:
    process = GaussianDiffusion(ObjectiveConfig("diffusion", num_timesteps=10))
    counts = process.times(torch.rand(100_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).bincount()
    assert len(counts) == 10 and counts.tolist() == pytest.approx([10_000] * 10, rel=0.04)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_loss_reads_nothing_back_from_the_device(prediction: str) -> None:
    """Tensors of the meta device have no values: whatever would wait for one, or mix devices, raises."""
    process = diffusion(prediction, 5.0).to("meta")
    x0, noise, t = (value.to("meta") for value in rows())
    xt = process.q_sample(x0, t, noise)
    losses = process.losses(torch.cat([xt, xt], dim=1), x0, xt, t, noise)
    assert {name: (value.shape, value.device.type) for name, value in losses.items()} == {
        name: ((len(TIMES),), "meta") for name in ("mse", "vb", "loss")
    }
