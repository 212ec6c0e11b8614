"""The Gaussian process of the paper: q(x_t|x_0), the posterior, the losses (Peebles & Xie 2022, §3.1; Nichol & Dhariwal 2021, §3.1).

The network predicts the noise ε or v = √ᾱ·ε − √(1−ᾱ)·x₀ (Salimans & Ho 2022, §4), and where it has 2C channels the covariance too.
Coefficients are kept in float64 and gathered per row in the type of the latents. Time t (B,) runs over 0 … T−1.
"""

import math

import torch
from torch import Tensor

from model.config import ObjectiveConfig


class GaussianDiffusion:
    """The forward process, its posterior and the training loss. Tables (T,) lie on the CPU until moved with `to`."""

    def __init__(self, config: ObjectiveConfig) -> None:
        if config.kind != "diffusion":
            raise ValueError(f"a diffusion process needs the objective 'diffusion', got {config.kind!r}")
        self.num_timesteps, self.prediction = config.num_timesteps, config.prediction
        self.betas = torch.linspace(config.beta_start, config.beta_end, config.num_timesteps, dtype=torch.float64)
        self.log_betas = self.betas.log()
        self.alpha_bar = torch.cumprod(1 - self.betas, dim=0)
        self.alpha, self.sigma = self.alpha_bar.sqrt(), (1 - self.alpha_bar).sqrt()  # x_t = α·x₀ + σ·ε
        alpha_bar_prev = torch.cat([torch.ones(1, dtype=torch.float64), self.alpha_bar[:-1]])
        variance = self.betas * (1 - alpha_bar_prev) / (1 - self.alpha_bar)  # β̃
        # β̃ is 0 at t = 0, where its logarithm is taken as that of t = 1.
        self.posterior_log_variance = torch.log(torch.cat([variance[1:2], variance[1:]]))
        self.mean_from_x0 = self.betas * alpha_bar_prev.sqrt() / (1 - self.alpha_bar)
        self.mean_from_xt = (1 - alpha_bar_prev) * (1 - self.betas).sqrt() / (1 - self.alpha_bar)
        if config.prediction == "noise":
            self.x0_from_xt, self.x0_from_predicted = self.alpha_bar.rsqrt(), (1 / self.alpha_bar - 1).sqrt()
        else:
            self.x0_from_xt, self.x0_from_predicted = self.alpha, self.sigma
        self.error_weight = _error_weight(config, self.alpha_bar)

    def to(self, device: torch.device | str) -> "GaussianDiffusion":
        """Moves the tables, so that a step on a GPU copies nothing and waits for nothing; times t must then lie there too."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))
        return self

    def times(self, uniform: Tensor) -> Tensor:
        """Training times (B,), int64, equally often each of 0 … T−1, by uniform numbers (B,) in (0, 1), float64."""
        return (uniform * self.num_timesteps).long()

    def gather(self, values: Tensor, t: Tensor, like: Tensor) -> Tensor:
        """values[t] as (B, 1, 1, 1) in the type of `like`."""
        return values[t].to(like.dtype).view(-1, 1, 1, 1)

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t = √ᾱ·x₀ + √(1−ᾱ)·ε."""
        return self.gather(self.alpha, t, x0) * x0 + self.gather(self.sigma, t, x0) * noise

    def target(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What the network is to predict: ε, or v."""
        if self.prediction == "noise":
            return noise
        return self.gather(self.alpha, t, x0) * noise - self.gather(self.sigma, t, x0) * x0

    def predict_x0(self, xt: Tensor, t: Tensor, predicted: Tensor) -> Tensor:
        """x_0 by a prediction of ε, (x_t − √(1−ᾱ)·ε)/√ᾱ, or of v, √ᾱ·x_t − √(1−ᾱ)·v (Salimans & Ho 2022, appendix D); not clipped."""
        return self.gather(self.x0_from_xt, t, xt) * xt - self.gather(self.x0_from_predicted, t, xt) * predicted

    def predict_noise(self, xt: Tensor, t: Tensor, predicted: Tensor) -> Tensor:
        """ε by a prediction of itself, or of v, √(1−ᾱ)·x_t + √ᾱ·v."""
        if self.prediction == "noise":
            return predicted
        return self.gather(self.sigma, t, xt) * xt + self.gather(self.alpha, t, xt) * predicted

    def q_posterior(self, x0: Tensor, xt: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(x_{t−1} | x_t, x_0)."""
        mean = self.gather(self.mean_from_x0, t, xt) * x0 + self.gather(self.mean_from_xt, t, xt) * xt
        return mean, self.gather(self.posterior_log_variance, t, xt).expand_as(mean)

    def p_mean_variance(self, out: Tensor, xt: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Network output (B, 2C, H, W) → mean, log-variance of p(x_{t−1}|x_t), and the predicted x_0, each (B, C, H, W).

        log σ² = f·log β + (1−f)·log β̃, where the last C channels hold 2f − 1.
        """
        assert out.shape[1] == 2 * xt.shape[1], f"{out.shape[1]} channels for latents of {xt.shape[1]} have no covariance"
        predicted, covariance = out.chunk(2, dim=1)
        fraction = (covariance + 1) / 2
        log_variance = fraction * self.gather(self.log_betas, t, xt) + (1 - fraction) * self.gather(self.posterior_log_variance, t, xt)
        x0 = self.predict_x0(xt, t, predicted)
        mean, _ = self.q_posterior(x0, xt, t)
        return mean, log_variance, x0

    def vlb_bits(self, out: Tensor, x0: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """One term of the variational bound, bits a dimension (B,): KL of the posteriors, at t = 0 the discretised Gaussian NLL."""
        true_mean, true_log_variance = self.q_posterior(x0, xt, t)
        mean, log_variance, _ = self.p_mean_variance(out, xt, t)
        kl = normal_kl(true_mean, true_log_variance, mean, log_variance).flatten(1).mean(1)
        nll = -discretised_log_likelihood(x0, mean, log_variance / 2).flatten(1).mean(1)
        return torch.where(t == 0, nll, kl) / math.log(2.0)

    def losses(self, out: Tensor, x0: Tensor, xt: Tensor, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Per row (B,): `mse`, the squared error of the prediction, and `loss`, that error weighted.

        `mse` is never weighted, so that runs with and without min-SNR can be compared. Where `out` (B, 2C, H, W) has a covariance there is
        `vb` too, the bound that trains it and nothing else (its mean is detached), and it is part of `loss`: the paper's hybrid.
        """
        predicted, covariance = out.split([x0.shape[1], out.shape[1] - x0.shape[1]], dim=1)
        mse = (self.target(x0, t, noise) - predicted).square().flatten(1).mean(1)
        loss = self.error_weight[t].to(mse.dtype) * mse
        if covariance.shape[1] == 0:
            return {"mse": mse, "loss": loss}
        vb = self.vlb_bits(torch.cat([predicted.detach(), covariance], dim=1), x0, xt, t)
        # L_vlb is estimated from one of T terms (×T) and weighted by 1/1000 as in the paper: together T/1000.
        vb = vb * (self.num_timesteps / 1000.0)
        return {"mse": mse, "vb": vb, "loss": loss + vb}


def _error_weight(config: ObjectiveConfig, alpha_bar: Tensor) -> Tensor:
    """Weight (T,) of the squared error: 1, or min(SNR, γ) of x₀'s error in terms of the prediction's (Hang et al. 2023).

    With SNR = ᾱ/(1−ᾱ) an error of ε is √SNR, and one of v √(SNR+1) times that of x₀.
    """
    if config.min_snr_gamma == 0:
        return torch.ones_like(alpha_bar)
    snr = alpha_bar / (1 - alpha_bar)
    return snr.clamp(max=config.min_snr_gamma) / (snr + 1 if config.prediction == "v" else snr)


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N₁ ‖ N₂) elementwise, in nats."""
    return 0.5 * (
        log_variance2 - log_variance1 - 1 + torch.exp(log_variance1 - log_variance2) + (mean1 - mean2).square() * torch.exp(-log_variance2)
    )


def discretised_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log-probability, in nats, of x in [−1, 1] under a Gaussian integrated over bins of 1/255 to each side (Ho et al. 2020, §3.3)."""
    inverse = torch.exp(-log_scale)

    def cdf(z: Tensor) -> Tensor:
        # The tanh approximation that the official code trains with, so that losses agree.
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    upper = cdf(inverse * (x - mean + 1 / 255))
    lower = cdf(inverse * (x - mean - 1 / 255))
    inside = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return inside.clamp(min=1e-12).log()
