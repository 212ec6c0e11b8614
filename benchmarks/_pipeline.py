"""DiTPipeline's way of drawing for models that it cannot hold: diffusers' own network, autoencoder and schedulers, one setting a batch.

DiTPipeline steps a diffusion only. A flow is stepped here by the schedulers that diffusers has for flows, with the pipeline's products:
both halves of guidance in one forward of `DiTTransformer2DModel`, a scheduler's step in its dtype, one decoding.
Shapes: B pictures · C, h, w latent.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from torch import Tensor

from model.checkpoint import Checkpoint
from model.diffusers_folder import scheduler_fields
from model.export import autoencoder, to_transformer
from model.noise import normal
from model.sampling import to_pixels

# diffusers has no Adams–Bashforth for a flow; Euler evaluates the network as often.
_FLOW_SCHEDULERS = {
    "euler": FlowMatchEulerDiscreteScheduler,
    "ab2": FlowMatchEulerDiscreteScheduler,
    "heun": FlowMatchHeunDiscreteScheduler,
}


class Pipeline:
    """Holds a checkpoint in diffusers' classes: the network in `dtype`, the autoencoder on a CPU in float32, as ours."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, compile: bool) -> None:
        assert checkpoint.vae is not None
        self.config, self.device, self.dtype = checkpoint.config, checkpoint.device, dtype
        transformer = to_transformer(checkpoint.dit)
        for block in transformer.transformer_blocks:  # each has its own time features; ours say which form the weights were trained with
            block.norm1.emb.time_proj.downscale_freq_shift = self.config.architecture.frequency_shift
        self.transformer: Any = transformer.to(self.device, dtype)
        if compile:
            self.transformer = torch.compile(self.transformer, dynamic=False)
        self.vae_dtype = dtype if self.device.type == "cuda" else torch.float32
        self.vae = autoencoder(checkpoint.vae).to(self.device, self.vae_dtype).eval()

    def scheduler(self, sampler: str) -> Any:
        objective = self.config.objective
        return _FLOW_SCHEDULERS[sampler]() if objective.kind == "flow" else DDIMScheduler(**scheduler_fields(objective))

    @torch.inference_mode()
    def latents(self, labels: Sequence[int | None], seeds: Sequence[int], *, steps: int, guidance_scale: float, sampler: str) -> Tensor:
        """One label and one seed per picture, None for the null class → (B, C, h, w) in the network's dtype."""
        c, guided = self.config.architecture, guidance_scale != 1
        y = torch.tensor([c.null_class if label is None else label for label in labels], device=self.device)
        classes = torch.cat([y, torch.full_like(y, c.null_class)]) if guided else y
        seed = torch.tensor(seeds, dtype=torch.int64, device=self.device)
        x = normal(seed, torch.zeros_like(seed), (c.in_channels, c.input_size, c.input_size)).to(self.dtype)
        scheduler = self.scheduler(sampler)
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            rows = torch.cat([x, x]) if guided else x
            out = self.transformer(rows, timestep=t.to(self.device).expand(len(rows)), class_labels=classes).sample[:, : c.in_channels]
            if guided:
                conditional, unconditional = out.chunk(2)
                out = unconditional + guidance_scale * (conditional - unconditional)
            x = scheduler.step(out, t, x).prev_sample
        return x

    @torch.inference_mode()
    def pictures(self, *arguments: Any, **setting: Any) -> Tensor:
        """The arguments of `latents` → uint8 (B, H, W, channels)."""
        latents = self.latents(*arguments, **setting) / self.vae.config.scaling_factor
        return to_pixels(self.vae.decode(latents.to(self.vae_dtype)).sample)
