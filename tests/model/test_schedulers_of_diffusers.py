"""Our tables against diffusers' schedulers of the same name and settings: whole trajectories from the same noise, in float64.

Where the two truly differ, and so are not compared:

- `DDIMScheduler` steps to t − T//n whatever its next time is: leading spacing always means the same, trailing only where n divides T, and
  the paper's and log-SNR spacing have no twin there.
- `DDPMScheduler` adds noise wherever t > 0, in the last step too, unless that is at t = 0: trailing spacing and n = 1 differ.
- `DPMSolverMultistepScheduler` has a leading spacing of its own, which leaves out t = 0: our times are handed to it.
- `FlowMatchEulerDiscreteScheduler` ends, unless told, in a step from 1/1000: it is given 1 − i/n.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers import scheduling_ddpm
from torch import Tensor

from model.config import ObjectiveConfig
from model.noise import normal
from model.samplers import SamplerTable, build_table
from model.sampling import sample_latents
from model.spacing import SPACINGS

NOISE, V, FLOW = ObjectiveConfig("diffusion"), ObjectiveConfig("diffusion", prediction="v"), ObjectiveConfig("flow")
OBJECTIVES = pytest.mark.parametrize("objective", [NOISE, V], ids=["noise", "v"])
PREDICTION = {"noise": "epsilon", "v": "v_prediction"}
SHAPE = (4, 3, 3)
SEEDS = torch.tensor([3, 5, 2**40])
START = normal(SEEDS, torch.zeros_like(SEEDS), SHAPE).double()

Network = Callable[[Tensor, Tensor], Tensor]


def network_of(objective: ObjectiveConfig, covariance: bool = False) -> Network:
    """A fixed nonlinear network of x and t (B,), with the covariance's v in −1 … 1 if asked."""
    scale = 1.0 if objective.kind == "flow" else objective.num_timesteps

    def network(x: Tensor, t: Tensor) -> Tensor:
        time = t.double().view(-1, 1, 1, 1) / scale
        predicted = torch.sin(2 * x + 3 * time) + 0.5 * x * time
        return torch.cat([predicted, torch.cos(x - 4 * time)], dim=1) if covariance else predicted

    return network


class Float64(Tensor):
    """A sample that stays as it is: the multistep and the flow scheduler round theirs to float32 inside every step."""

    def to(self, *_: Any, **__: Any) -> "Float64":
        return self


def precise(scheduler: Any) -> Any:
    """The scheduler with ᾱ in float64: its own are float32."""
    config = scheduler.config
    alpha_bar = torch.cumprod(1 - torch.linspace(config.beta_start, config.beta_end, config.num_train_timesteps, dtype=torch.float64), 0)
    torch.testing.assert_close(scheduler.alphas_cumprod, alpha_bar.float(), rtol=1e-4, atol=0)
    scheduler.alphas_cumprod = alpha_bar
    return scheduler


def theirs(scheduler: Any, network: Network, step: Callable[..., Tensor], time_scale: float = 1.0) -> Tensor:
    """`step(out, t, x, noise)` over the scheduler's times; the noise is that of model.noise for seed and evaluation."""
    x = START
    for i, t in enumerate(scheduler.timesteps):
        noise = normal(SEEDS, torch.full_like(SEEDS, i + 1), SHAPE).double()
        x = step(network(x, torch.full((len(SEEDS),), float(t) / time_scale)), t, x, noise)
    return x


def ours(table: SamplerTable, network: Network) -> Tensor:
    return sample_latents(lambda x, t, _: network(x, t), START, torch.zeros_like(SEEDS), 10, table, seeds=SEEDS)


def assert_same(one: Tensor, other: Tensor) -> None:
    assert one.dtype == other.dtype == torch.float64 and float(other.std()) > 0.1
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def descending(spacing: str, steps: int, objective: ObjectiveConfig = NOISE) -> list[int]:
    return SPACINGS[spacing](objective, steps)[::-1]


@OBJECTIVES
@pytest.mark.parametrize("steps", [2, 7, 40])
@pytest.mark.parametrize("spacing", ["leading", "paper"])
@pytest.mark.parametrize(
    ("sampler", "variance_type"), [("ddpm", "learned_range"), ("ddpm-small", "fixed_small"), ("ddpm-large", "fixed_large")]
)
def test_ddpm_is_that_of_diffusers(
    monkeypatch: pytest.MonkeyPatch, objective: ObjectiveConfig, sampler: str, variance_type: str, spacing: str, steps: int
) -> None:
    scheduler = precise(DDPMScheduler(variance_type=variance_type, prediction_type=PREDICTION[objective.prediction], clip_sample=False))
    if spacing == "leading":
        scheduler.set_timesteps(steps)
    else:
        scheduler.set_timesteps(timesteps=descending(spacing, steps))
    network = network_of(objective, covariance=sampler == "ddpm")

    def step(out: Tensor, t: Tensor, x: Tensor, noise: Tensor) -> Tensor:
        monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, **__: noise)
        return scheduler.step(out, t, x, return_dict=False)[0]

    table = build_table(objective, sampler, steps, spacing=spacing)
    assert table.t.tolist() == scheduler.timesteps.tolist()
    assert_same(ours(table, network), theirs(scheduler, network, step))


@OBJECTIVES
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(
    ("spacing", "steps"), [("leading", 1), ("leading", 7), ("leading", 50), ("trailing", 1), ("trailing", 8), ("trailing", 50)]
)
def test_ddim_is_that_of_diffusers(objective: ObjectiveConfig, spacing: str, steps: int, eta: float) -> None:
    scheduler = precise(DDIMScheduler(prediction_type=PREDICTION[objective.prediction], timestep_spacing=spacing, clip_sample=False))
    scheduler.set_timesteps(steps)
    network = network_of(objective)

    def step(out: Tensor, t: Tensor, x: Tensor, noise: Tensor) -> Tensor:
        return scheduler.step(out, t, x, eta=eta, variance_noise=noise, return_dict=False)[0]

    table = build_table(objective, "ddim", steps, spacing=spacing, eta=eta)
    assert table.t.tolist() == scheduler.timesteps.tolist()
    assert_same(ours(table, network), theirs(scheduler, network, step))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # theirs: an array made of a tensor
@OBJECTIVES
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 16])  # the scheduler has a rule of its own below 15 steps
@pytest.mark.parametrize("spacing", ["trailing", "paper", "leading", "log-snr"])
@pytest.mark.parametrize("sampler", ["dpm-solver++", "sde-dpm-solver++"])
def test_dpm_solver_is_that_of_diffusers(objective: ObjectiveConfig, sampler: str, spacing: str, steps: int) -> None:
    scheduler = precise(
        DPMSolverMultistepScheduler(
            algorithm_type={"dpm-solver++": "dpmsolver++", "sde-dpm-solver++": "sde-dpmsolver++"}[sampler],
            prediction_type=PREDICTION[objective.prediction],
            timestep_spacing="trailing",
            solver_order=2,
            solver_type="midpoint",
            lower_order_final=True,
            final_sigmas_type="zero",
        )
    )
    if spacing == "trailing":
        scheduler.set_timesteps(steps)
    else:
        scheduler.set_timesteps(timesteps=descending(spacing, steps))
    alpha_bar = scheduler.alphas_cumprod[scheduler.timesteps]
    sigmas = torch.cat([((1 - alpha_bar) / alpha_bar).sqrt(), torch.zeros(1, dtype=torch.float64)])
    torch.testing.assert_close(scheduler.sigmas, sigmas.float(), rtol=1e-6, atol=0)
    scheduler.sigmas = sigmas
    network = network_of(objective)

    def step(out: Tensor, t: Tensor, x: Tensor, noise: Tensor) -> Tensor:
        sample, noise = x.as_subclass(Float64), noise.as_subclass(Float64)
        return scheduler.step(out, t, sample, variance_noise=noise, return_dict=False)[0].as_subclass(Tensor)

    table = build_table(objective, sampler, steps, spacing=spacing)
    assert table.t.tolist() == scheduler.timesteps.tolist()
    assert_same(ours(table, network), theirs(scheduler, network, step))


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_euler_is_that_of_diffusers(steps: int, shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    scheduler.sigmas = scheduler.sigmas.double()
    network = network_of(FLOW)

    def step(out: Tensor, t: Tensor, x: Tensor, _: Tensor) -> Tensor:
        return scheduler.step(out, t, x.as_subclass(Float64), return_dict=False)[0].as_subclass(Tensor)

    table = build_table(FLOW, "euler", steps, shift=shift)
    torch.testing.assert_close(table.t, scheduler.timesteps.double() / 1000, rtol=1e-6, atol=0)
    assert_same(ours(table, network), theirs(scheduler, network, step, time_scale=1000))
