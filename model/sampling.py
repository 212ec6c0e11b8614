"""Samplers as coefficient tables, and `sample()`, the slow reference loop that the engine is held against.

A request keeps K latents S (K, C, H, W). One network evaluation gives `out`, and then, with numbers from one row of the table,

    S' = A·S + B·out + d·exp(½(f·hi + (1−f)·lo))·noise        f = (v + 1)/2 from the covariance channels (Nichol & Dhariwal 2021, eq. 15)

so that requests with different samplers, step counts and positions are one batched update. Without learned covariance lo = hi = 0.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, repeat
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.config import ObjectiveConfig
from model.diffusion import GaussianDiffusion
from model.noise import normal

if TYPE_CHECKING:
    from model.checkpoint import Checkpoint

MAX_STEPS = 1000
SMALLEST_BATCH = 4  # with fewer rows the CPU's kernels give other bits; `sample()` pads to this, as the worker does


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

    @property
    def evaluations(self) -> int:
        return self.t.shape[0]


def paper_timesteps(num_timesteps: int, steps: int) -> list[int]:
    """`steps` of the times 0 … T−1, ascending: a stride of (T−1)/(n−1), rounded; one step takes t = T−1."""
    if steps == 1:
        return [num_timesteps - 1]
    stride = (num_timesteps - 1) / (steps - 1)
    # Accumulated, as the official code does it: the product would round to another time at some step counts.
    return [round(t) for t in accumulate(repeat(stride, steps - 1), initial=0.0)]


def _table(t: Tensor, fraction: Tensor, a: Tensor, b: Tensor, d: Tensor, low: Tensor, high: Tensor) -> SamplerTable:
    return SamplerTable(t, fraction, a.view(-1, 1, 1), b.view(-1, 1), d, low, high)


def _respaced(objective: ObjectiveConfig, steps: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Times (n,), fractions (n,), ᾱ (n,) and the next ᾱ (n,), in sampling order from noise to clean."""
    times = torch.tensor(paper_timesteps(objective.num_timesteps, steps))
    alpha_bar = GaussianDiffusion(objective).alpha_bar[times]
    alpha_bar_next = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    fraction = times.double() / max(1, objective.num_timesteps - 1)
    return times.double().flip(0), fraction.flip(0), alpha_bar.flip(0), alpha_bar_next.flip(0)


def ddpm(objective: ObjectiveConfig, steps: int) -> SamplerTable:
    """Ancestral sampling with learned covariance over a respaced process (Peebles & Xie 2022, §4; Nichol & Dhariwal 2021, §4)."""
    t, fraction, alpha_bar, alpha_bar_next = _respaced(objective, steps)
    beta = 1 - alpha_bar / alpha_bar_next
    x0_coefficient = beta * alpha_bar_next.sqrt() / (1 - alpha_bar)
    xt_coefficient = (1 - alpha_bar_next) * (1 - beta).sqrt() / (1 - alpha_bar)
    variance = beta * (1 - alpha_bar_next) / (1 - alpha_bar)
    if steps > 1:
        variance[-1] = variance[-2]  # β̃ is 0 at the last step, which adds no noise
    else:
        variance[-1] = beta[-1]
    d = torch.ones_like(t)
    d[-1] = 0
    a = x0_coefficient * alpha_bar.rsqrt() + xt_coefficient
    b = -x0_coefficient * (1 / alpha_bar - 1).sqrt()
    return _table(t, fraction, a, b, d, variance.log(), beta.log())


def ddim(objective: ObjectiveConfig, steps: int) -> SamplerTable:
    """Deterministic DDIM, η = 0 (Song et al. 2021, eq. 12)."""
    t, fraction, alpha_bar, alpha_bar_next = _respaced(objective, steps)
    a = (alpha_bar_next / alpha_bar).sqrt()
    b = (1 - alpha_bar_next).sqrt() - a * (1 - alpha_bar).sqrt()
    zero = torch.zeros_like(t)
    return _table(t, fraction, a, b, zero, zero, zero)


def euler(objective: ObjectiveConfig, steps: int) -> SamplerTable:
    """Euler steps of equal length on dx/dt = velocity from t = 1 to 0 (Liu et al. 2022)."""
    t = 1 - torch.arange(steps, dtype=torch.float64) / steps
    zero = torch.zeros_like(t)
    return _table(t, t, torch.ones_like(t), torch.full_like(t, -1 / steps), zero, zero, zero)


SAMPLERS: dict[str, dict[str, Callable[[ObjectiveConfig, int], SamplerTable]]] = {
    "diffusion": {"ddpm": ddpm, "ddim": ddim},
    "flow": {"euler": euler},
}


def available_samplers(objective: ObjectiveConfig, learn_sigma: bool) -> list[str]:
    """The samplers that a model can run: `ddpm` needs the learned covariance."""
    return [name for name in SAMPLERS[objective.kind] if name != "ddpm" or learn_sigma]


def max_steps(objective: ObjectiveConfig) -> int:
    return min(MAX_STEPS, objective.num_timesteps) if objective.kind == "diffusion" else MAX_STEPS


def build_table(objective: ObjectiveConfig, sampler: str, steps: int, *, learn_sigma: bool = True) -> SamplerTable:
    """The table of a named sampler; ValueError names what a model of this objective can do."""
    known = available_samplers(objective, learn_sigma)
    if sampler not in known:
        raise ValueError(f"sampler {sampler!r} does not fit this model ({objective.kind}), which has: {', '.join(known)}")
    if not 1 <= steps <= max_steps(objective):
        raise ValueError(f"steps must be between 1 and {max_steps(objective)}, got {steps}")
    return SAMPLERS[objective.kind][sampler](objective, steps)


def guide(conditional: Tensor, unconditional: Tensor, scale: Tensor | float, channels: int) -> Tensor:
    """Classifier-free guidance on the first `channels` channels; the others (the covariance) are the conditional row's."""
    guided = unconditional[:, :channels] + scale * (conditional[:, :channels] - unconditional[:, :channels])
    return torch.cat([guided, conditional[:, channels:]], dim=1)


def update(state: Tensor, out: Tensor, a: Tensor, b: Tensor, d: Tensor, low: Tensor, high: Tensor, noise: Tensor) -> Tensor:
    """One sampler step for B requests, each at its own row of its own table.

    state (B, K, C, H, W), out (B, C or 2C, H, W), a (B, K, K), b (B, K), d, low, high (B,), noise (B, C, H, W) → new state.
    """
    channels = state.shape[2]
    mixed = sum(a[:, :, k, None, None, None] * state[:, None, k] for k in range(state.shape[1]))
    new = mixed + b[:, :, None, None, None] * out[:, None, :channels]
    # A row without noise keeps d = 0; its exponential is finite all the same, so 0·noise is 0. Float64: see model.noise.
    per_row = (slice(None), None, None, None)
    log_variance = low[per_row].double()
    if out.shape[1] == 2 * channels:
        fraction = (out[:, channels:].double() + 1) / 2
        log_variance = fraction * high[per_row] + (1 - fraction) * log_variance
    return new + (d[per_row] * torch.exp(log_variance / 2) * noise).to(new.dtype)[:, None]


def to_pixels(images: Tensor) -> Tensor:
    """Images (B, C, H, W) in [−1, 1] → uint8 (B, H, W, C)."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


@torch.inference_mode()
def sample_latents(
    dit: Callable[[Tensor, Tensor, Tensor], Tensor],
    latents: Tensor,
    labels: Tensor,
    null_class: int,
    table: SamplerTable,
    *,
    guidance_scale: float = 1.0,
    guidance_channels: int | None = None,
    seeds: Tensor,
) -> Tensor:
    """Latents (B, C, H, W) of pure noise → clean latents, all requests in step; guidance 1 costs one row each, other scales two."""
    channels = latents.shape[1]
    state = latents[:, None]
    guided = guidance_scale != 1.0
    y = torch.cat([labels, torch.full_like(labels, null_class)]) if guided else labels
    for i in range(table.evaluations):
        x = state[:, 0]
        rows = torch.cat([x, x]) if guided else x
        t = torch.full((rows.shape[0],), float(table.t[i]), device=x.device)
        out = dit(rows, t, y)
        if guided:
            conditional, unconditional = out.chunk(2)
            out = guide(conditional, unconditional, guidance_scale, guidance_channels or channels)
        noise = normal(seeds, torch.full_like(seeds, i + 1), tuple(x.shape[1:]))
        columns = (table.a, table.b, table.d, table.log_variance_low, table.log_variance_high)
        a, b, d, low, high = (values[i].to(x.device, x.dtype).expand(x.shape[0], *values.shape[1:]) for values in columns)
        state = update(state, out, a, b, d, low, high, noise)
    return state[:, 0]


@torch.inference_mode()
def sample(
    checkpoint: "Checkpoint",
    class_labels: Sequence[int | None],
    *,
    steps: int,
    guidance_scale: float,
    sampler: str,
    seeds: Sequence[int],
) -> Tensor:
    """Class indices (None: unconditional) and seeds, one of each per picture → uint8 images (B, H, W, channels).

    Raises ValueError for an unknown sampler, step count or class, or for a checkpoint without a VAE.
    """
    if checkpoint.vae is None:
        raise ValueError("this checkpoint has no VAE, so its latents cannot become pictures")
    if len(class_labels) != len(seeds):
        raise ValueError(f"{len(class_labels)} class labels but {len(seeds)} seeds: one of each per picture")
    config = checkpoint.config.architecture
    wrong = [y for y in class_labels if y is not None and not 0 <= y < config.num_classes]
    if wrong:
        raise ValueError(f"class labels are 0 … {config.num_classes - 1} or None, got {wrong[0]}")
    device = checkpoint.device
    count = len(seeds)
    padding = max(0, SMALLEST_BATCH - count)
    y = torch.tensor([config.null_class if c is None else c for c in [*class_labels, *[None] * padding]], device=device)
    seed = torch.tensor([*seeds, *[0] * padding], dtype=torch.int64, device=device)
    shape = (config.in_channels, config.input_size, config.input_size)
    table = build_table(checkpoint.config.objective, sampler, steps, learn_sigma=config.learn_sigma)
    latents = sample_latents(
        checkpoint.dit,
        normal(seed, torch.zeros_like(seed), shape),
        y,
        config.null_class,
        table,
        guidance_scale=guidance_scale,
        seeds=seed,
    )
    return to_pixels(checkpoint.vae.decode(latents))[:count]
