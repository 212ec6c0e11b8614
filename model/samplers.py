"""Samplers as coefficient tables.

A request keeps K latents S (K, C, H, W), of which the first is x. One network evaluation gives `out`, and then, with one row of the table,

    S' = A·S + B·out + d·exp(½(f·hi + (1−f)·lo))·noise        f = (v + 1)/2 from the covariance channels (Nichol & Dhariwal 2021, eq. 15)

so that requests with different samplers, step counts and positions are one batched update (`model.sampling.update`). Noise enters x alone.
What the network takes the clean latent to be at that evaluation is p·x + q·out, with two more numbers of the row: previews are made of it.

Notation: α = √ᾱ, σ = √(1−ᾱ), ε the noise that the network predicts, x₀ = (x − σ·ε)/α; a prime marks the next time.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model.config import ObjectiveConfig
from model.diffusion import GaussianDiffusion
from model.spacing import SPACINGS, flow_times

MAX_STEPS = 1000
MAX_STATES = 2  # K of the largest table
MAX_SHIFT = 100.0


@dataclass(frozen=True)
class SamplerTable:
    """One row per network evaluation, E rows, float64 on the CPU."""

    t: Tensor  # (E,) time given to the network
    fraction: Tensor  # (E,) t/T in 0…1, 0 = clean: what a guidance interval is measured in
    a: Tensor  # (E, K, K)
    b: Tensor  # (E, K)
    d: Tensor  # (E,)
    log_variance_low: Tensor  # (E,)
    log_variance_high: Tensor  # (E,)
    clean: Tensor  # (E, 2) p and q

    @property
    def evaluations(self) -> int:
        return self.t.shape[0]

    @property
    def states(self) -> int:
        """K, the latents that a request keeps."""
        return self.a.shape[1]

    def padded(self, states: int) -> "SamplerTable":
        """The same sampler with K = `states`; the latents added stay zero."""
        added = states - self.states
        a = torch.nn.functional.pad(self.a, (0, added, 0, added))
        return replace(self, a=a, b=torch.nn.functional.pad(self.b, (0, added)))


@dataclass(frozen=True)
class _Steps:
    """A respaced diffusion in sampling order, noise to clean; each (n,) float64."""

    t: Tensor
    fraction: Tensor
    alpha_bar: Tensor
    alpha_bar_next: Tensor  # 1 after the last

    @property
    def beta(self) -> Tensor:
        """Variance of the step between neighbours."""
        return 1 - self.alpha_bar / self.alpha_bar_next

    @property
    def clean(self) -> Tensor:
        """x₀ of x and ε, (n, 2)."""
        return torch.stack([self.alpha_bar.rsqrt(), -(1 / self.alpha_bar - 1).sqrt()], dim=1)


def _steps(objective: ObjectiveConfig, times: list[int]) -> _Steps:
    """`times` ascending."""
    t = torch.tensor(times)
    alpha_bar = GaussianDiffusion(objective).alpha_bar[t]
    following = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    fraction = t.double() / max(1, objective.num_timesteps - 1)
    return _Steps(t.double().flip(0), fraction.flip(0), alpha_bar.flip(0), following.flip(0))


def _first_order(s: _Steps, a: Tensor, b: Tensor, d: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> SamplerTable:
    zero = torch.zeros_like(a)
    low, high = zero if low is None else low, zero if high is None else high
    return SamplerTable(s.t, s.fraction, a.view(-1, 1, 1), b.view(-1, 1), d, low, high, s.clean)


def _posterior(s: _Steps) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients of x and ε in the mean of p(x'|x), and the posterior's variance β̃ (Ho et al. 2020, eq. 7)."""
    x0 = s.beta * s.alpha_bar_next.sqrt() / (1 - s.alpha_bar)
    xt = (1 - s.alpha_bar_next) * (1 - s.beta).sqrt() / (1 - s.alpha_bar)
    variance = s.beta * (1 - s.alpha_bar_next) / (1 - s.alpha_bar)
    return x0 * s.alpha_bar.rsqrt() + xt, -x0 * (1 / s.alpha_bar - 1).sqrt(), variance


def _but_last(values: Tensor) -> Tensor:
    """The last step goes to the clean latent and adds no noise."""
    return torch.cat([values[:-1], torch.zeros_like(values[-1:])])


def ddpm(s: _Steps) -> SamplerTable:
    """Ancestral sampling with learned covariance (Peebles & Xie 2022, §4; Nichol & Dhariwal 2021, §4)."""
    a, b, variance = _posterior(s)
    variance[-1] = variance[-2] if len(variance) > 1 else s.beta[-1]  # 0 there, of which there is no logarithm
    return _first_order(s, a, b, _but_last(torch.ones_like(a)), variance.log(), s.beta.log())


def ddpm_small(s: _Steps) -> SamplerTable:
    """Ancestral sampling with the posterior's variance β̃ (Ho et al. 2020, §3.2)."""
    a, b, variance = _posterior(s)
    return _first_order(s, a, b, _but_last(variance.sqrt()))


def ddpm_large(s: _Steps) -> SamplerTable:
    """Ancestral sampling with the variance β (Ho et al. 2020, §3.2)."""
    a, b, _ = _posterior(s)
    return _first_order(s, a, b, _but_last(s.beta.sqrt()))


def ddim(s: _Steps, eta: float = 0.0) -> SamplerTable:
    """DDIM (Song et al. 2021, eq. 12): deterministic at η = 0, ancestral with β̃ at η = 1."""
    variance = eta**2 * _posterior(s)[2]
    a = (s.alpha_bar_next / s.alpha_bar).sqrt()
    b = (1 - s.alpha_bar_next - variance).clamp(min=0).sqrt() - a * (1 - s.alpha_bar).sqrt()
    return _first_order(s, a, b, _but_last(variance.sqrt()))


def _two_step(s: _Steps, keep: Tensor, gain: Tensor, d: Tensor) -> SamplerTable:
    """x' = keep·x + gain·((1+w)·x₀ − w·x₀ of the evaluation before) + d·noise, which remembers x₀; w extrapolates in log SNR.

    The first step has nothing to remember, and the last one, to the clean latent, has an infinite step of log SNR: there w = 0.
    """
    alpha, sigma = s.alpha_bar.sqrt(), (1 - s.alpha_bar).sqrt()
    log_snr = torch.log(alpha / sigma)
    h = log_snr.diff()
    w = torch.zeros_like(alpha)
    w[1:-1] = h[1:] / (2 * h[:-1])
    a, b = torch.zeros(len(alpha), 2, 2, dtype=torch.float64), torch.zeros(len(alpha), 2, dtype=torch.float64)
    a[:, 0, 0], a[:, 0, 1], a[:, 1, 0] = keep + gain * (1 + w) / alpha, -gain * w, 1 / alpha
    b[:, 0], b[:, 1] = -gain * (1 + w) * sigma / alpha, -sigma / alpha
    zero = torch.zeros_like(alpha)
    return SamplerTable(s.t, s.fraction, a, b, d, zero, zero, s.clean)


def dpm_solver(s: _Steps) -> SamplerTable:
    """DPM-Solver++(2M) (Lu et al. 2022b, Algorithm 2): second order in log SNR, deterministic."""
    keep = ((1 - s.alpha_bar_next) / (1 - s.alpha_bar)).sqrt()  # σ'/σ
    return _two_step(s, keep, s.alpha_bar_next.sqrt() - s.alpha_bar.sqrt() * keep, torch.zeros_like(keep))


def sde_dpm_solver(s: _Steps) -> SamplerTable:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022b, §5 and eq. 19): the same for the diffusion's stochastic equation."""
    keep, sigma_next = ((1 - s.alpha_bar_next) / (1 - s.alpha_bar)).sqrt(), (1 - s.alpha_bar_next).sqrt()
    decay = (s.alpha_bar / s.alpha_bar_next).sqrt() * keep  # e^−h, h the step of log SNR
    return _two_step(s, keep * decay, s.alpha_bar_next.sqrt() * (1 - decay**2), sigma_next * (1 - decay**2).sqrt())


def _of_v(table: SamplerTable, alpha_bar: Tensor) -> SamplerTable:
    """The same sampler for a network that predicts v: ε = σ·x + α·v (Salimans & Ho 2022, appendix D)."""
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    a = table.a.clone()
    a[:, :, 0] += table.b * sigma[:, None]
    return replace(table, a=a, b=table.b * alpha[:, None], clean=torch.stack([alpha, -sigma], dim=1))


def _flow_table(t: Tensor, a: Tensor, b: Tensor) -> SamplerTable:
    zero = torch.zeros_like(t)
    return SamplerTable(t, t, a, b, zero, zero, zero, torch.stack([torch.ones_like(t), -t], dim=1))


def euler(times: Tensor) -> SamplerTable:
    """Euler steps on dx/dt = velocity (Liu et al. 2022); first order."""
    h = times.diff()
    return _flow_table(times[:-1], torch.ones_like(h).view(-1, 1, 1), h.view(-1, 1))


def heun(times: Tensor) -> SamplerTable:
    """Heun's method (Karras et al. 2022): a second evaluation where an Euler step would end, but in the last step; second order."""
    rows: list[tuple[float, list[list[float]], list[float]]] = []
    steps = list(zip(times[:-1].tolist(), times.diff().tolist(), strict=True))
    for i, (t, h) in enumerate(steps):
        if i == len(steps) - 1:
            rows.append((t, [[1, 0], [0, 0]], [h, 0]))
        else:
            rows.append((t, [[1, 0], [1, 0]], [h, h / 2]))  # x and half the step from where it began
            rows.append((steps[i + 1][0], [[0, 1], [0, 0]], [h / 2, 0]))
    t, a, b = (torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True))
    return _flow_table(t, a, b)


def ab2(times: Tensor) -> SamplerTable:
    """Two-step Adams–Bashforth on unequal steps (Hairer et al. 1993, §III.5): second order with one evaluation a step."""
    h = times.diff()
    w = torch.zeros_like(h)
    w[1:] = h[1:] / (2 * h[:-1])
    a, b = torch.zeros(len(h), 2, 2, dtype=torch.float64), torch.zeros(len(h), 2, dtype=torch.float64)
    a[:, 0, 0], a[:, 0, 1] = 1, -h * w
    b[:, 0], b[:, 1] = h * (1 + w), 1
    return _flow_table(times[:-1], a, b)


DIFFUSION: dict[str, Callable[[_Steps], SamplerTable]] = {
    "ddpm": ddpm,
    "ddpm-small": ddpm_small,
    "ddpm-large": ddpm_large,
    "ddim": ddim,
    "dpm-solver++": dpm_solver,
    "sde-dpm-solver++": sde_dpm_solver,
}
FLOW: dict[str, Callable[[Tensor], SamplerTable]] = {"euler": euler, "heun": heun, "ab2": ab2}


# On Gaussian data ten steps of DPM-Solver++ end 0.02 from the exact moments with this spacing, 0.24 with the paper's (DDIM: 0.15).
_OWN_SPACING = {"dpm-solver++": "log-snr", "sde-dpm-solver++": "log-snr"}


def own_spacing(objective: ObjectiveConfig, sampler: str) -> str | None:
    """The spacing that a sampler takes unless told; None for flow, which has none."""
    return _OWN_SPACING.get(sampler, "paper") if objective.kind == "diffusion" else None


def available_samplers(objective: ObjectiveConfig, learn_sigma: bool) -> list[str]:
    """The samplers that a model can run: `ddpm` needs the learned covariance."""
    return list(FLOW) if objective.kind == "flow" else [name for name in DIFFUSION if name != "ddpm" or learn_sigma]


def available_spacings(objective: ObjectiveConfig) -> list[str]:
    """Names of the spacings of diffusion times; flow time has a `shift` instead."""
    return list(SPACINGS) if objective.kind == "diffusion" else []


def max_steps(objective: ObjectiveConfig) -> int:
    return min(MAX_STEPS, objective.num_timesteps) if objective.kind == "diffusion" else MAX_STEPS


def build_table(
    objective: ObjectiveConfig,
    sampler: str,
    steps: int,
    *,
    learn_sigma: bool = True,
    spacing: str | None = None,
    eta: float = 0.0,
    shift: float = 1.0,
) -> SamplerTable:
    """The table of a named sampler. `spacing` (by default the sampler's own) and `eta` (of `ddim`) are for diffusion, `shift` for flow.

    ValueError names what a model of this objective can do.
    """
    known = available_samplers(objective, learn_sigma)
    if sampler not in known:
        raise ValueError(f"sampler {sampler!r} does not fit this model ({objective.kind}), which has: {', '.join(known)}")
    if not 1 <= steps <= max_steps(objective):
        raise ValueError(f"steps must be between 1 and {max_steps(objective)}, got {steps}")
    if not 0 <= eta <= 1 or (eta and sampler != "ddim"):
        raise ValueError(f"eta is 0 … 1 and belongs to the sampler ddim, got {eta} for {sampler}")
    if objective.kind == "flow":
        if spacing is not None:
            raise ValueError(f"spacing {spacing!r} is for diffusion; a flow model's times are moved by shift")
        if not 0 < shift <= MAX_SHIFT:
            raise ValueError(f"shift must be above 0 and at most {MAX_SHIFT:g}, got {shift}")
        return FLOW[sampler](flow_times(steps, shift))
    if shift != 1:
        raise ValueError(f"shift is for flow models; this one has spacing: {', '.join(SPACINGS)}")
    if spacing is not None and spacing not in SPACINGS:
        raise ValueError(f"no spacing {spacing!r}; there is: {', '.join(SPACINGS)}")
    respaced = _steps(objective, SPACINGS[spacing or _OWN_SPACING.get(sampler, "paper")](objective, steps))
    table = ddim(respaced, eta) if sampler == "ddim" else DIFFUSION[sampler](respaced)
    return _of_v(table, respaced.alpha_bar) if objective.prediction == "v" else table
