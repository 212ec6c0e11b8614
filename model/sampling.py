"""One sampler step for many requests, guidance, and `sample()`, the slow reference loop that the engine is held against.

Samplers are tables of numbers: model/samplers.py.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.noise import normal
from model.samplers import SamplerTable, build_table

if TYPE_CHECKING:
    from model.checkpoint import Checkpoint

SMALLEST_BATCH = 4  # with fewer rows the CPU's kernels give other bits; `sample()` pads to this, as the worker does


def guide(
    conditional: Tensor,
    unconditional: Tensor,
    scale: Tensor | float,
    channels: Tensor | int,
    rescale: Tensor | float | None = None,
) -> Tensor:
    """Classifier-free guidance on the first `channels` channels; the others (the covariance) are the conditional row's.

    Outputs (B, C or 2C, H, W); scale, channels and rescale are one number, or one per row as (B, 1, 1, 1). `rescale` φ mixes in, by φ, the
    guided output shrunk to the conditional one's spread over the guided channels (Lin et al. 2024, §3.4).
    """
    chosen = torch.arange(conditional.shape[1], device=conditional.device).view(1, -1, 1, 1) < channels
    guided = unconditional + scale * (conditional - unconditional)
    if rescale is not None:
        ratio = _spread(conditional, chosen) / _spread(guided, chosen).clamp(min=1e-12)
        ratio = ratio.nan_to_num(1.0, posinf=1.0)  # squares overflowed: a row that is not rescaled stays as it is alone
        guided = guided * (1 + rescale * (ratio - 1))
    return torch.where(chosen, guided, conditional)


def _spread(x: Tensor, chosen: Tensor) -> Tensor:
    """Standard deviation over the chosen channels, (B, 1, 1, 1)."""
    count = chosen.flatten(1).sum(1).view(-1, 1, 1, 1) * x.shape[2] * x.shape[3]
    centred = torch.where(chosen, x - _sum(torch.where(chosen, x, 0)) / count, 0)
    return (_sum(centred.square()) / count).sqrt()


def _sum(x: Tensor) -> Tensor:
    """Sum of each row, (B, 1, 1, 1), in an order of its own: a kernel's depends on the number of rows, and so would a picture's bits."""
    x = x.flatten(1)
    while x.shape[1] > 1:
        if x.shape[1] % 2:
            x = torch.nn.functional.pad(x, (0, 1))
        half = x.shape[1] // 2
        x = x[:, :half] + x[:, half:]
    return x.view(-1, 1, 1, 1)


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
    new[:, 0] += (d[per_row] * torch.exp(log_variance / 2) * noise).to(new.dtype)  # x alone, not what a solver remembers
    return new


def to_pixels(images: Tensor) -> Tensor:
    """Images (B, C, H, W) in [−1, 1] → uint8 (B, H, W, C)."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def runs_all_blocks(guided: Sequence[bool], every: int) -> list[bool]:
    """Per evaluation, with a block cache that is renewed at every n-th: also where guidance begins, whose null row has none yet."""
    return [i % every == 0 or (now and not before) for i, (now, before) in enumerate(zip(guided, [False, *guided], strict=False))]


@torch.inference_mode()
def sample_latents(
    dit: Callable[[Tensor, Tensor, Tensor], Tensor],
    latents: Tensor,
    labels: Tensor,
    null_class: int,
    table: SamplerTable,
    *,
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    guidance_channels: int | None = None,
    guidance_rescale: float = 0.0,
    block_cache: int = 1,
    cached: Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]] | None = None,
    seeds: Tensor,
) -> Tensor:
    """Latents (B, C, H, W) of pure noise → clean latents, all requests in step.

    A request costs two rows while it is guided (scale ≠ 1 and t/T inside the interval), else one. `guidance_channels` is by default all.
    `block_cache` n > 1: all blocks run at every n-th evaluation only; then the network is `cached`, as DiT.cached, in place of `dit`.
    """
    assert block_cache == 1 or cached is not None
    channels = latents.shape[1]
    low, high = guidance_interval
    state = torch.cat([latents[:, None], torch.zeros_like(latents[:, None]).expand(-1, table.states - 1, -1, -1, -1)], dim=1)
    with_null = torch.cat([labels, torch.full_like(labels, null_class)])
    # On the device before the loop: a copy in a step would wait for the device.
    columns = [v.to(latents.device, latents.dtype) for v in (table.a, table.b, table.d, table.log_variance_low, table.log_variance_high)]
    all_guided = [guidance_scale != 1.0 and low <= fraction <= high for fraction in table.fraction.tolist()]
    renewed, change = runs_all_blocks(all_guided, block_cache), None
    for i, guided in enumerate(all_guided):
        x = state[:, 0]
        rows = torch.cat([x, x]) if guided else x
        t = torch.full((rows.shape[0],), float(table.t[i]), device=x.device)
        y = with_null if guided else labels
        if cached and block_cache > 1:
            out, change = cached(rows, t, y, None if renewed[i] or change is None else change[: len(rows)])
        else:
            out = dit(rows, t, y)
        if guided:
            conditional, unconditional = out.chunk(2)
            out = guide(conditional, unconditional, guidance_scale, guidance_channels or channels, guidance_rescale or None)
        # Noise costs more than the update: none is drawn that d = 0 would cancel.
        noise = normal(seeds, torch.full_like(seeds, i + 1), tuple(x.shape[1:])) if table.d[i] else torch.zeros_like(x)
        a, b, d, low_variance, high_variance = (v[i].expand(x.shape[0], *v.shape[1:]) for v in columns)
        state = update(state, out, a, b, d, low_variance, high_variance, noise)
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
    spacing: str | None = None,
    eta: float = 0.0,
    shift: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    guidance_channels: int | None = None,
    guidance_rescale: float = 0.0,
    block_cache: int = 1,
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
    objective = checkpoint.config.objective
    spacing = spacing or checkpoint.config.spacing_of(sampler)
    table = build_table(objective, sampler, steps, learn_sigma=config.learn_sigma, spacing=spacing, eta=eta, shift=shift)
    device, count = checkpoint.device, len(seeds)
    padding = max(0, SMALLEST_BATCH - count)
    y = torch.tensor([config.null_class if c is None else c for c in [*class_labels, *[None] * padding]], device=device)
    seed = torch.tensor([*seeds, *[0] * padding], dtype=torch.int64, device=device)
    latents = sample_latents(
        checkpoint.dit,
        normal(seed, torch.zeros_like(seed), (config.in_channels, config.input_size, config.input_size)),
        y,
        config.null_class,
        table,
        guidance_scale=guidance_scale,
        guidance_interval=guidance_interval,
        guidance_channels=guidance_channels,
        guidance_rescale=guidance_rescale,
        block_cache=block_cache,
        cached=checkpoint.dit.cached,
        seeds=seed,
    )
    return to_pixels(checkpoint.vae.decode(latents))[:count]
