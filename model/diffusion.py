"""The Gaussian process of the paper: q(x_t|x_0), the posterior, the hybrid loss (Peebles & Xie 2022, §3.1; Nichol & Dhariwal 2021, §3.1).

Coefficients are kept in float64 on the CPU and gathered per row as float32. Time t (B,) runs over 0 … T−1.
"""

import math

import torch
from torch import Tensor

from model.config import ObjectiveConfig


class GaussianDiffusion:
    """The forward process, its posterior and the training loss for noise prediction with learned covariance."""

    def __init__(self, config: ObjectiveConfig) -> None:
        if config.kind != "diffusion":
            raise ValueError(f"a diffusion process needs the objective 'diffusion', got {config.kind!r}")
        self.num_timesteps = config.num_timesteps
        self.betas = torch.linspace(config.beta_start, config.beta_end, config.num_timesteps, dtype=torch.float64)
        self.alpha_bar = torch.cumprod(1 - self.betas, dim=0)
        alpha_bar_prev = torch.cat([torch.ones(1, dtype=torch.float64), self.alpha_bar[:-1]])
        self.posterior_variance = self.betas * (1 - alpha_bar_prev) / (1 - self.alpha_bar)  # β̃
        # β̃ is 0 at t = 0, where its logarithm is taken as that of t = 1.
        self.posterior_log_variance = torch.log(torch.cat([self.posterior_variance[1:2], self.posterior_variance[1:]]))
        self.x0_coefficient = self.betas * alpha_bar_prev.sqrt() / (1 - self.alpha_bar)
        self.xt_coefficient = (1 - alpha_bar_prev) * (1 - self.betas).sqrt() / (1 - self.alpha_bar)

    def gather(self, values: Tensor, t: Tensor, like: Tensor) -> Tensor:
        """values[t] as (B, 1, 1, 1) in the type and on the device of `like`."""
        return values.to(like.device)[t].to(like.dtype).view(-1, 1, 1, 1)

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t = √ᾱ·x₀ + √(1−ᾱ)·ε."""
        return self.gather(self.alpha_bar.sqrt(), t, x0) * x0 + self.gather((1 - self.alpha_bar).sqrt(), t, x0) * noise

    def predict_x0(self, xt: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return self.gather(self.alpha_bar.rsqrt(), t, xt) * xt - self.gather((1 / self.alpha_bar - 1).sqrt(), t, xt) * noise

    def q_posterior(self, x0: Tensor, xt: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(x_{t−1} | x_t, x_0)."""
        mean = self.gather(self.x0_coefficient, t, xt) * x0 + self.gather(self.xt_coefficient, t, xt) * xt
        return mean, self.gather(self.posterior_log_variance, t, xt).expand_as(mean)

    def p_mean_variance(self, out: Tensor, xt: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Network output (B, 2C, H, W) → mean, log-variance of p(x_{t−1}|x_t), and the predicted x_0, each (B, C, H, W).

        log σ² = f·log β + (1−f)·log β̃ with f = (v+1)/2; x_0 is not clipped.
        """
        noise, v = out.chunk(2, dim=1)
        fraction = (v + 1) / 2
        log_variance = fraction * self.gather(self.betas.log(), t, xt) + (1 - fraction) * self.gather(self.posterior_log_variance, t, xt)
        x0 = self.predict_x0(xt, t, noise)
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
        """The hybrid loss per row (B,): `mse` on the noise, `vb` for the covariance only (its mean is detached), `loss` their sum."""
        predicted, v = out.chunk(2, dim=1)
        mse = (noise - predicted).square().flatten(1).mean(1)
        vb = self.vlb_bits(torch.cat([predicted.detach(), v], dim=1), x0, xt, t)
        # L_vlb is estimated from one of T terms (×T) and weighted by 1/1000 as in the paper: together T/1000.
        vb = vb * (self.num_timesteps / 1000.0)
        return {"mse": mse, "vb": vb, "loss": mse + vb}


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
