"""Parameters and multiply-accumulates, counted from the built model on the meta device: `dit cost`.

The paper's "Gflops" are GMACs of one forward of one picture (Peebles & Xie 2022, Table 1). Counted are matrix products, convolutions and
attention, as the paper does, and not norms, activations or additions.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from model.config import BLOCKS, PRESETS, DiTConfig, VAEConfig, preset
from model.dit import DiT
from model.vae import VAE


@dataclass(frozen=True)
class Cost:
    """What a model costs. GMACs are 10⁹ multiply-accumulates of one picture."""

    model: str
    block: str
    image_size: int
    parameters: int  # of the DiT, its frozen position table included, as the paper counts
    gmacs: float  # one forward
    guided_gmacs: float  # one evaluation with guidance: the conditional and the unconditional row
    decoder_gmacs: float | None  # the VAE's decoder; None without a VAE
    steps: int
    picture_gmacs: float  # `steps` guided evaluations and the decoder


def macs(run: Callable[[], Any]) -> int:
    """Multiply-accumulates of the matrix products, convolutions and attention in `run`."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops() // 2


def dit_cost(config: DiTConfig) -> tuple[int, float]:
    """Parameters, the frozen position table included, and the GMACs of one forward of one row."""
    with torch.device("meta"):
        dit = DiT(config).to("meta")  # its position table is a real one
        x = torch.empty(1, config.in_channels, config.input_size, config.input_size)
        t, y = torch.empty(1), torch.empty(1, dtype=torch.int64)
        return sum(p.numel() for p in dit.parameters()) + dit.pos_embed.numel(), macs(lambda: dit(x, t, y)) / 1e9


@functools.cache
def decoder_gmacs(config: VAEConfig) -> float:
    with torch.device("meta"):
        vae = VAE(config).to("meta")
        latents = torch.empty(1, config.latent_channels, config.latent_size, config.latent_size)
        return macs(lambda: vae.decode(latents)) / 1e9


def cost(name: str, config: DiTConfig, vae: VAEConfig | None, image_size: int, *, steps: int) -> Cost:
    """The cost of a picture of `steps` evaluations, each guided."""
    (parameters, one), decoder = dit_cost(config), decoder_gmacs(vae) if vae else None
    return Cost(
        model=name,
        block=config.block,
        image_size=image_size,
        parameters=parameters,
        gmacs=one,
        guided_gmacs=2 * one,
        decoder_gmacs=decoder,
        steps=steps,
        picture_gmacs=steps * 2 * one + (decoder or 0),
    )


def preset_cost(name: str, *, image_size: int = 256, block: str = "adaln-zero", steps: int = 250) -> Cost:
    """A preset with the paper's autoencoder. ValueError for a name, size or block that there is not."""
    config = preset(name, image_size=image_size, block=block)
    return cost(name, config, VAEConfig(image_size=image_size, image_channels=3), image_size, steps=steps)


def paper_costs(*, steps: int = 250) -> list[Cost]:
    """The twelve presets at 256, XL/2 at 512, and the other three blocks at XL/2."""
    twelve = [preset_cost(name, steps=steps) for name in PRESETS]
    others = [preset_cost("DiT-XL/2", block=block, steps=steps) for block in BLOCKS if block != "adaln-zero"]
    return [*twelve, preset_cost("DiT-XL/2", image_size=512, steps=steps), *others]


def table(costs: list[Cost]) -> list[str]:
    """The lines to print."""
    steps = costs[0].steps
    lines = [("model", "block", "pixels", "parameters", "GMACs", "guided", "decoder", f"{steps} steps")]
    for c in costs:
        decoder = "none" if c.decoder_gmacs is None else f"{c.decoder_gmacs:.2f}"
        numbers = (f"{c.parameters:,}", f"{c.gmacs:.2f}", f"{c.guided_gmacs:.2f}", decoder, f"{c.picture_gmacs:,.1f}")
        lines.append((c.model, c.block, str(c.image_size), *numbers))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    aligned = ["  ".join(v.ljust(w) if i < 2 else v.rjust(w) for i, (v, w) in enumerate(zip(line, widths, strict=True))) for line in lines]
    return [*aligned, "GMACs: 10⁹ multiply-accumulates of one picture (the paper's Gflops); guided: one evaluation of two rows."]
