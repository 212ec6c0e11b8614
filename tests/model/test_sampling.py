"""The batched update, guidance, and the reference loop around them. The tables themselves: tests/model/test_samplers.py."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from model.checkpoint import Checkpoint
from model.config import ObjectiveConfig
from model.diffusion import GaussianDiffusion
from model.noise import normal
from model.samplers import DIFFUSION as DIFFUSION_SAMPLERS
from model.samplers import FLOW as FLOW_SAMPLERS
from model.samplers import build_table
from model.sampling import guide, sample, sample_latents, to_pixels, update

DIFFUSION, FLOW = ObjectiveConfig("diffusion"), ObjectiveConfig("flow")
EVERY_SAMPLER = [("diffusion", name) for name in DIFFUSION_SAMPLERS] + [("flow", name) for name in FLOW_SAMPLERS]
SAMPLER_IDS = [name for _, name in EVERY_SAMPLER]
SHAPE = (4, 4, 4)


def start(rows: int = 4, seed: int = 100) -> tuple[Tensor, Tensor]:
    """Seeds (B,) and their initial noise (B, C, H, W)."""
    seeds = torch.arange(rows) + seed
    return seeds, normal(seeds, torch.zeros_like(seeds), SHAPE)


# --- the update --------------------------------------------------------------------------------------------------------


def mixed_rows(kind: str, out_channels: int) -> list[tuple[Tensor, ...]]:
    """Arguments of `update` for rows of every sampler of the objective, at different steps of different counts."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for name in (name for of, name in EVERY_SAMPLER if of == kind):
        for steps, i in ((1, 0), (7, 0), (7, 6), (50, 13), (250, 249)):
            spacing = "paper" if kind == "diffusion" else None  # in log SNR 250 steps are fewer times
            table = build_table(ObjectiveConfig(kind), name, steps, spacing=spacing).padded(2)
            numbers = (table.a, table.b, table.d, table.log_variance_low, table.log_variance_high)
            state, out, noise = (torch.randn(s, generator=generator) for s in ((1, 2, *SHAPE), (1, out_channels, 4, 4), (1, *SHAPE)))
            rows.append((state, out, *(v[i : i + 1].float() for v in numbers), noise))
    return rows


@pytest.mark.parametrize(("kind", "out_channels"), [("diffusion", 8), ("diffusion", 4), ("flow", 4)])
def test_rows_of_different_tables_step_together_as_each_alone(kind: str, out_channels: int) -> None:
    rows = mixed_rows(kind, out_channels)
    for count in range(1, len(rows) + 1):
        together = update(*(torch.cat(column) for column in zip(*rows[-count:], strict=True)))
        for i, row in enumerate(rows[-count:]):
            assert torch.equal(update(*row)[0], together[i])


def test_a_sampler_may_remember_several_latents() -> None:
    """K = 2: the state's matrix mixes what the solver keeps, and b says where the new output goes."""
    state, out = torch.randn(2, 2, *SHAPE), torch.randn(2, *SHAPE)
    a = torch.tensor([[[0.5, 2.0], [0.0, 0.0]], [[1.0, -1.0], [3.0, 0.25]]])
    b, zero = torch.tensor([[0.1, 1.0], [0.0, 2.0]]), torch.zeros(2)
    new = update(state, out, a, b, zero, zero, zero, torch.randn(2, *SHAPE))
    expected = torch.einsum("bjk,bkchw->bjchw", a, state) + b[:, :, None, None, None] * out[:, None]
    torch.testing.assert_close(new, expected)


@pytest.mark.parametrize("out_channels", [4, 8])
def test_noise_enters_x_and_not_what_a_solver_remembers(out_channels: int) -> None:
    state, out, noise = torch.randn(2, 2, *SHAPE), torch.randn(2, out_channels, 4, 4), torch.randn(2, *SHAPE)
    a, b, d, zero = torch.randn(2, 2, 2), torch.randn(2, 2), torch.tensor([0.5, 2.0]), torch.zeros(2)
    kept = state.clone()
    quiet, noisy = (update(state, out, a, b, of, zero, zero, noise) for of in (zero, d))
    assert torch.equal(state, kept), "what came in stays as it was"
    assert torch.equal(noisy[:, 1], quiet[:, 1])
    torch.testing.assert_close(noisy[:, 0], quiet[:, 0] + d.view(2, 1, 1, 1) * noise)


def test_the_covariance_interpolates_the_logarithms_of_the_variances() -> None:
    """v = −1 takes the low end, v = 1 the high one, and other values go on along the line, as trained."""
    zero, one = torch.zeros(5, 1, 1), torch.ones(5)
    v = torch.tensor([-1.0, 0.0, 1.0, 0.5, 1.5])
    out = torch.cat([torch.zeros(5, 1, 1, 1), v.view(-1, 1, 1, 1)], dim=1)
    new = update(torch.zeros(5, 1, 1, 1, 1), out, zero, zero[..., 0], one, one * -4.0, one * 2.0, torch.ones(5, 1, 1, 1))
    torch.testing.assert_close(2 * new.flatten().log(), torch.tensor([-4.0, -1.0, 2.0, 0.5, 3.5]))


# --- the loop ----------------------------------------------------------------------------------------------------------


def test_ddpm_is_the_reference_loop_with_the_noise_of_each_evaluation() -> None:
    """Every step by `p_mean_variance`; evaluation 0 is the initial latent, evaluation k + 1 the noise after the k-th network call."""
    objective, steps = ObjectiveConfig("diffusion", num_timesteps=6), 6
    diffusion, (seeds, x) = GaussianDiffusion(objective), start()

    def network(x: Tensor, t: Tensor, _: Tensor) -> Tensor:
        return torch.cat([x.sin(), x.cos()], dim=1) * (1 + t.view(-1, 1, 1, 1) / 10)

    latents = sample_latents(network, x, torch.zeros(4, dtype=torch.int64), 10, build_table(objective, "ddpm", steps), seeds=seeds)
    for k, t in enumerate(reversed(range(steps))):
        time = torch.full((4,), t)
        mean, log_variance, _ = diffusion.p_mean_variance(network(x, time, time), x, time)
        x = mean + (t > 0) * torch.exp(log_variance / 2) * normal(seeds, torch.full_like(seeds, k + 1), SHAPE)
    torch.testing.assert_close(latents, x, rtol=1e-4, atol=1e-4)


MEAN, STD = 0.5, 0.6  # of Gaussian data, for which the exact network is linear


@pytest.mark.parametrize("sampler", DIFFUSION_SAMPLERS)
def test_samples_of_gaussian_data_have_its_moments(sampler: str) -> None:
    """Drawn with noise, in float32; tests/model/test_samplers.py has the moments without."""
    alpha_bar = GaussianDiffusion(DIFFUSION).alpha_bar.float()

    def network(x: Tensor, t: Tensor, _: Tensor) -> Tensor:
        alpha = alpha_bar[t.long()].view(-1, 1, 1, 1)
        noise = (1 - alpha).sqrt() * (x - alpha.sqrt() * MEAN) / (alpha * STD**2 + 1 - alpha)  # E[ε | x_t]
        return torch.cat([noise, torch.zeros_like(noise)], dim=1) if sampler == "ddpm" else noise

    seeds, x = start(128)  # 8,192 numbers
    latents = sample_latents(network, x, torch.zeros_like(seeds), 10, build_table(DIFFUSION, sampler, 250), seeds=seeds)
    assert float(latents.mean()) == pytest.approx(MEAN, abs=0.03) and float(latents.std()) == pytest.approx(STD, abs=0.03)


# --- guidance ----------------------------------------------------------------------------------------------------------


def rows(count: int, channels: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Conditional and unconditional outputs (B, channels, 3, 5), of different spread."""
    generator = torch.Generator().manual_seed(seed)
    conditional = torch.randn(count, channels, 3, 5, generator=generator)
    return conditional, 2 * torch.randn(count, channels, 3, 5, generator=generator) + 0.3


@pytest.mark.parametrize("rescale", [None, 0.0, 0.7])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_guidance_moves_its_channels_and_leaves_the_others_and_the_covariance_to_the_conditional_row(
    channels: int, rescale: float | None
) -> None:
    conditional, unconditional = rows(2)
    guided = guide(conditional, unconditional, 3.0, channels, rescale)
    assert torch.equal(guided[:, channels:], conditional[:, channels:])
    if not rescale:
        torch.testing.assert_close(guided[:, :channels], (3 * conditional - 2 * unconditional)[:, :channels])


@pytest.mark.parametrize("rescale", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("channels", [3, 4])
def test_rescaled_guidance_is_its_formula(channels: int, rescale: float) -> None:
    """Lin et al. 2024, §3.4, over the guided channels: φ·guided·σ_cond/σ_guided + (1−φ)·guided."""
    conditional, unconditional = rows(3)
    c, u = (x[:, :channels].double() for x in (conditional, unconditional))
    plain = u + 2.5 * (c - u)
    ratio = c.flatten(1).std(1, correction=0) / plain.flatten(1).std(1, correction=0)
    expected = rescale * plain * ratio.view(-1, 1, 1, 1) + (1 - rescale) * plain
    torch.testing.assert_close(
        guide(conditional, unconditional, 2.5, channels, rescale)[:, :channels].double(), expected, rtol=1e-5, atol=1e-5
    )


def test_fully_rescaled_guidance_has_the_spread_of_the_conditional_row() -> None:
    conditional, unconditional = rows(4)
    plain, rescaled = (guide(conditional, unconditional, 6.0, 4, rescale)[:, :4].flatten(1) for rescale in (None, 1.0))
    torch.testing.assert_close(rescaled.std(1), conditional[:, :4].flatten(1).std(1))
    assert bool((plain.std(1) > 2 * rescaled.std(1)).all())


def test_a_rescale_of_nothing_changes_no_bit() -> None:
    conditional, unconditional = rows(3)
    plain = guide(conditional, unconditional, 2.5, 4)
    assert torch.equal(guide(conditional, unconditional, 2.5, 4, 0.0), plain)
    assert torch.equal(guide(conditional, unconditional, 2.5, 4, torch.tensor([0.0, 0.5, 0.0]).view(3, 1, 1, 1))[::2], plain[::2])


def test_a_row_without_spread_stays_finite_when_it_is_rescaled() -> None:
    flat = torch.ones(2, 8, 3, 5)
    assert bool(guide(flat, flat, 5.0, 4, 1.0).isfinite().all())


def test_a_huge_output_is_not_spoilt_by_a_neighbours_rescale() -> None:
    """Its squares overflow, and what it gives alone is all the same finite."""
    conditional, unconditional = rows(2)
    conditional[0] *= 1e30
    rescale = torch.tensor([0.0, 0.5]).view(2, 1, 1, 1)
    assert torch.equal(guide(conditional, unconditional, 2.0, 4, rescale)[0], guide(conditional, unconditional, 2.0, 4)[0])


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Among which a kernel may share out one long row, but not many."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("size", [(4, 3, 5), (8, 8, 8), (4, 136, 136)], ids=str)
@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.usefixtures("two_threads")
def test_numbers_per_row_guide_each_row_as_alone_bit_for_bit_in_any_number_of_rows(size: tuple[int, int, int], rescaled: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    most = 9
    conditional, unconditional = (torch.randn(most, *size, generator=generator) for _ in range(2))
    scale, rescale = (torch.rand(most, generator=generator).view(-1, 1, 1, 1) for _ in range(2))
    scale, rescale = 1 + scale, 1 - rescale * (torch.arange(most) % 2).view(-1, 1, 1, 1)  # factors near 1, and so with all their bits
    channels = torch.tensor([3, 4]).repeat(5)[:most].view(-1, 1, 1, 1)
    alone = [
        guide(conditional[[i]], unconditional[[i]], float(scale[i]), int(channels[i]), float(rescale[i]) if rescaled else None)
        for i in range(most)
    ]
    for count in range(1, most + 1):
        columns = (conditional, unconditional, scale, channels, *([rescale] if rescaled else []))
        together = guide(*(column[:count] for column in columns))
        assert torch.equal(together, torch.cat(alone[:count])), f"{count} rows"


class Watched:
    """A network that notes the classes of each call."""

    def __init__(self, out_channels: int = 4) -> None:
        self.out_channels = out_channels
        self.classes: list[list[int]] = []
        self.times: list[float] = []

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.classes.append(y.tolist())
        self.times.append(float(t[0]))
        out = torch.sin(x * (1 + y.view(-1, 1, 1, 1) / 7))
        return torch.cat([out, torch.cos(x + y.view(-1, 1, 1, 1))], dim=1)[:, : self.out_channels]


def sampled(network: Watched, objective: ObjectiveConfig, sampler: str, steps: int, **guidance: Any) -> Tensor:
    seeds, latents = start(2)
    return sample_latents(network, latents, torch.tensor([1, 2]), 10, build_table(objective, sampler, steps), seeds=seeds, **guidance)


def test_guidance_of_one_asks_for_the_conditional_only() -> None:
    one, near = Watched(), Watched()
    plain, close = (sampled(n, FLOW, "euler", 2, guidance_scale=scale) for n, scale in ((one, 1.0), (near, 1.0 + 1e-6)))
    assert one.classes == [[1, 2]] * 2 and near.classes == [[1, 2, 10, 10]] * 2
    torch.testing.assert_close(close, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("objective", "sampler", "interval", "rows"),
    [
        (FLOW, "euler", (0.25, 0.5), [2, 2, 4, 4]),  # times 1, 3/4, 1/2, 1/4: both ends are in
        (FLOW, "euler", (0.26, 0.49), [2, 2, 2, 2]),
        (FLOW, "euler", (1.0, 1.0), [4, 2, 2, 2]),
        (FLOW, "heun", (0.5, 0.75), [2, 4, 4, 4, 4, 2, 2]),  # 1, 3/4, 3/4, 1/2, 1/2, 1/4, 1/4: each evaluation by its own time
        (DIFFUSION, "ddim", (0.0, 0.0), [2, 2, 2, 4]),  # t/(T−1) is 1, 2/3, 1/3, 0
        (DIFFUSION, "ddim", (1.0, 1.0), [4, 2, 2, 2]),
        (DIFFUSION, "ddim", (0.3, 0.7), [2, 4, 4, 2]),
        (DIFFUSION, "ddim", (0.0, 1.0), [4, 4, 4, 4]),
    ],
)
def test_a_second_row_is_computed_only_inside_the_interval_ends_included(
    objective: ObjectiveConfig, sampler: str, interval: tuple[float, float], rows: list[int]
) -> None:
    network = Watched()
    sampled(network, objective, sampler, 4, guidance_scale=3.0, guidance_interval=interval)
    assert [len(classes) for classes in network.classes] == rows


def test_outside_its_interval_guidance_does_nothing_and_inside_it_does() -> None:
    plain, outside, some, all_of_it = (
        sampled(Watched(), FLOW, "euler", 4, guidance_scale=scale, guidance_interval=interval)
        for scale, interval in ((1.0, (0.0, 1.0)), (4.0, (0.0, 0.2)), (4.0, (0.5, 1.0)), (4.0, (0.0, 1.0)))
    )
    assert torch.equal(plain, outside)
    assert not torch.equal(some, plain) and not torch.equal(some, all_of_it)


@pytest.mark.parametrize("rescale", [0.0, 0.5])
@pytest.mark.parametrize("channels", [None, 3])
def test_the_noise_of_a_guided_step_is_of_the_conditional_rows_covariance(channels: int | None, rescale: float) -> None:
    """A first step by hand from the two outputs, of which the conditional one alone gives the variance."""
    seeds, x = start(2)
    table = build_table(DIFFUSION, "ddpm", 2)
    network = Watched(out_channels=8)
    ends: list[Tensor] = []

    def recording(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        ends.append(x[:2])
        return network(x, t, y)

    settings = {"guidance_scale": 4.0, "guidance_channels": channels, "guidance_rescale": rescale}
    sample_latents(recording, x, torch.tensor([1, 2]), 10, table, seeds=seeds, **settings)
    t = torch.full((2,), 999)
    conditional, unconditional = network(x, t, torch.tensor([1, 2])), network(x, t, torch.tensor([10, 10]))
    mean = guide(conditional, unconditional, 4.0, channels or 4, rescale or None)[:, :4]
    numbers = (float(v[0]) for v in (table.a.flatten(), table.b.flatten(), table.log_variance_low, table.log_variance_high))
    a, b, low, high = numbers
    fraction = (conditional[:, 4:] + 1) / 2
    deviation = torch.exp((fraction * high + (1 - fraction) * low) / 2)
    expected = a * x + b * mean + deviation * normal(seeds, torch.ones_like(seeds), SHAPE)
    torch.testing.assert_close(ends[1], expected, rtol=1e-4, atol=1e-4)


# --- pictures -----------------------------------------------------------------------------------------------------------


def test_each_picture_depends_on_its_seed_and_class_alone(build_checkpoint: Callable[..., Checkpoint]) -> None:
    """Four rows or more: below that the CPU's kernels give other bits (DESIGN.md), and the worker pads."""
    checkpoint = build_checkpoint("flow")
    settings = {"steps": 3, "guidance_scale": 2.0, "sampler": "euler"}
    large = 2**53 - 1
    pictures = sample(checkpoint, [0, 1, None, 3], seeds=[5, large, 7, 8], **settings)
    assert torch.equal(sample(checkpoint, [0, 1, None, 3], seeds=[5, large, 7, 8], **settings), pictures)
    others = sample(checkpoint, [2, 3, 1, None, 0, 1], seeds=[1, 8, large, 7, 5, 11], **settings)
    assert torch.equal(others[[4, 2, 3, 1]], pictures)
    assert len({p.numpy().tobytes() for p in others}) == 6


@pytest.mark.parametrize(("objective", "sampler"), EVERY_SAMPLER, ids=SAMPLER_IDS)
def test_pictures_are_bytes_of_the_models_size(build_checkpoint: Callable[..., Checkpoint], objective: str, sampler: str) -> None:
    pictures = sample(build_checkpoint(objective), [0, None], steps=2, guidance_scale=1.5, sampler=sampler, seeds=[1, 2])
    assert pictures.shape == (2, 16, 16, 1) and pictures.dtype == torch.uint8 and float(pictures.float().std()) > 5


def test_unconditional_ignores_guidance(build_checkpoint: Callable[..., Checkpoint]) -> None:
    """Both halves are the null class, so any scale gives their common output."""
    checkpoint = build_checkpoint("flow")
    one, four = (
        sample(checkpoint, [None] * 4, steps=3, guidance_scale=scale, sampler="euler", seeds=[1, 2, 3, 4]).int() for scale in (1.0, 4.0)
    )
    assert int((one - four).abs().max()) <= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_labels": [0, 4]}, "class labels are 0 … 3 or None, got 4"),
        ({"class_labels": [-1, 0]}, "got -1"),
        ({"seeds": [1]}, "2 class labels but 1 seeds"),
        ({"sampler": "ddim"}, "euler"),
        ({"steps": 0}, "between 1 and 1000, got 0"),
    ],
)
def test_sample_refuses_what_it_cannot_do(build_checkpoint: Callable[..., Checkpoint], changes: dict[str, object], message: str) -> None:
    arguments = {"class_labels": [0, 1], "seeds": [1, 2], "steps": 2, "guidance_scale": 1.0, "sampler": "euler"}
    with pytest.raises(ValueError, match=message):
        sample(build_checkpoint("flow"), **{**arguments, **changes})


def test_ancestral_sampling_is_refused_without_a_learned_covariance(build_checkpoint: Callable[..., Checkpoint]) -> None:
    checkpoint = build_checkpoint("diffusion", learn_sigma=False)
    settings = {"steps": 2, "guidance_scale": 1.0, "seeds": [1, 2]}
    assert len(sample(checkpoint, [0, 1], sampler="ddim", **settings)) == 2
    with pytest.raises(ValueError, match=r"'ddpm'.*ddim"):
        sample(checkpoint, [0, 1], sampler="ddpm", **settings)


def test_a_checkpoint_without_a_decoder_makes_no_pictures(build_checkpoint: Callable[..., Checkpoint]) -> None:
    checkpoint = build_checkpoint("flow")
    checkpoint.vae = None
    with pytest.raises(ValueError, match="no VAE"):
        sample(checkpoint, [0], steps=1, guidance_scale=1.0, sampler="euler", seeds=[0])


def test_pixels_are_rounded_and_clamped() -> None:
    images = torch.tensor([-3.0, -1.0, 0.0, 0.5, 1.0, 3.0]).view(1, 1, 2, 3)
    assert to_pixels(images).flatten().tolist() == [0, 0, 128, 191, 255, 255]  # 127.5 rounds to even
    assert to_pixels(torch.zeros(2, 3, 4, 5)).shape == (2, 4, 5, 3)


def test_rounding_to_pixels_is_the_papers() -> None:
    """clamp(127.5·x + 128, 0, 255) cut off, as the paper's script has it, is rounding to the nearest level."""

    def paper(x: Tensor) -> Tensor:
        return torch.clamp(127.5 * x + 128.0, 0, 255).to(torch.uint8)

    every_bfloat16 = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16).float()
    values = every_bfloat16[every_bfloat16.isfinite()]
    assert torch.equal(to_pixels(values.view(1, 1, 1, -1)).flatten(), paper(values))
    drawn = torch.rand(1_000_000, generator=torch.Generator().manual_seed(0)) * 2.2 - 1.1
    difference = (to_pixels(drawn.view(1, 1, 1, -1)).flatten().int() - paper(drawn).int()).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 1e-4  # where float32's own rounding makes a tie
