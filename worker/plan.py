"""A request's sampler as plain numbers, one row per network evaluation."""

from dataclasses import dataclass

import torch

from model.samplers import MAX_STATES, SamplerTable
from model.sampling import runs_all_blocks
from worker.protocol import ALL_CHANNELS, GenerationRequest

K = MAX_STATES  # latents kept by any sampler; those that keep fewer leave the rest zero
FIRST_CHANNELS = 3  # that the official code guides


@dataclass(frozen=True)
class Plan:
    """What the runner reads of a job at each evaluation."""

    t: list[float]
    coefficients: list[list[float]]  # a (K·K), b (K), d, low, high, clean (2)
    guided: list[bool]
    all_blocks: list[bool]  # false where the middle blocks' change is taken from the block cache
    guidance_channels: int
    guidance_rescale: float


def make_plan(table: SamplerTable, request: GenerationRequest, channels: int) -> Plan:
    """Guidance costs a second row only while its scale is not 1 and t/T is inside its interval. `channels` are those of a latent."""
    table = table.padded(K)
    columns = [table.a.flatten(1), table.b, table.d[:, None], table.log_variance_low[:, None], table.log_variance_high[:, None]]
    columns.append(table.clean)
    low, high = request.guidance_interval
    guided = [request.guidance_scale != 1.0 and low <= f <= high for f in table.fraction.tolist()]
    return Plan(
        t=table.t.tolist(),
        coefficients=torch.cat(columns, dim=1).tolist(),
        guided=guided,
        all_blocks=runs_all_blocks(guided, request.block_cache),
        guidance_channels=channels if request.guidance_channels == ALL_CHANNELS else min(FIRST_CHANNELS, channels),
        guidance_rescale=request.guidance_rescale,
    )
