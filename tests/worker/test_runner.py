"""A tick of the runner is a step of the reference sampler for every picture, whatever it asks for, and leaves nothing behind."""

import random
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from model.sampling import sample
from tests.worker.plays import EVERY_SAMPLER, SAMPLERS, Play, alone, by_itself, random_request, reference_latents, same
from worker.protocol import FIRST_THREE_CHANNELS, LARGEST_SEED, GenerationRequest
from worker.runner import Runner
from worker.scheduler import Picture

MakeRunner = Callable[..., Runner]
MakeRequest = Callable[..., GenerationRequest]


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """The CPU's kernels share rows out among threads, and so depend most on how many rows there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


# --- beside the slow reference -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("objective", "learned"), [("flow", False), ("diffusion", False), ("diffusion", True)])
def test_every_sampler_gives_the_latents_of_the_reference(make_runner: MakeRunner, objective: str, learned: bool) -> None:
    """Every sampler three times, each time with other spacing, shift, interval, channels, rescale and labels, all in one crowd; with and
    without a learned covariance, which `ddpm` needs."""
    runner, rng = make_runner(objective, max_rows=16, learn_sigma=learned), random.Random(0)
    requests = []
    for sampler in [name for name in SAMPLERS[objective] * 3 if learned or name != "ddpm"]:
        drawn = random_request(rng, objective)
        while drawn.sampler != sampler:
            drawn = random_request(rng, objective)
        requests.append(drawn)
    found = Play(runner).run([(i % 4, request) for i, request in enumerate(requests)])
    for name, request in enumerate(requests):
        ours = torch.stack([found[str(name), i][0] for i in range(request.num_images)])
        torch.testing.assert_close(ours, reference_latents(runner, request), rtol=1e-4, atol=1e-4, msg=lambda m, r=request: f"{r}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("objective", "sampler"), EVERY_SAMPLER, ids=[name for _, name in EVERY_SAMPLER])
def test_pictures_are_those_of_the_reference_sampler(
    make_runner: MakeRunner, make_request: MakeRequest, objective: str, sampler: str, dtype: torch.dtype
) -> None:
    """One grey level, since the reference pads neither five rows nor their decode."""
    runner = make_runner(objective, dtype, max_rows=16)
    request = make_request(class_labels=(0, 1, 2, 3, None), guidance_scale=4.0, steps=5, sampler=sampler, seed=11)
    pictures = Play(runner).run([(0, request)])
    ours = np.stack([pictures["0", i][1] for i in range(5)])
    theirs = sample(runner.checkpoint, request.class_labels, steps=5, guidance_scale=4.0, sampler=sampler, seeds=range(11, 16)).numpy()
    assert ours.std() > 1, "the pictures show something"
    assert np.abs(ours.astype(int) - theirs).max() <= (1 if dtype == torch.float32 else 3)


def test_every_choice_of_guidance_spacing_and_noise_changes_the_picture(make_runner: MakeRunner, make_request: MakeRequest) -> None:
    for objective, plain, changes in [
        ("flow", {"steps": 4}, [{"shift": 3.0}, {"shift": 0.5}]),
        ("diffusion", {"steps": 4, "sampler": "ddim"}, [{"spacing": name} for name in ("leading", "trailing", "log-snr")]),
        ("diffusion", {"steps": 4, "sampler": "ddim"}, [{"eta": 0.2}, {"eta": 0.9}]),
    ]:
        runner = make_runner(objective)
        changes += [{"guidance_channels": FIRST_THREE_CHANNELS}, {"guidance_rescale": 0.3}, {"guidance_rescale": 1.0}]
        changes += [{"sampler": name} for name in SAMPLERS[objective] if name != plain.get("sampler", "euler")]
        seen: dict[bytes, list[dict[str, object]]] = {}
        for change in [{}, *changes]:
            latents, _ = by_itself(runner, make_request(**{**plain, **change}))
            seen.setdefault(latents.numpy().tobytes(), []).append(change)
        assert [alike for alike in seen.values() if len(alike) > 1] == []


def test_the_papers_spacing_is_what_a_request_without_one_gets(make_runner: MakeRunner, make_request: MakeRequest) -> None:
    runner = make_runner("diffusion")
    assert same(*(by_itself(runner, make_request(sampler="ddim", spacing=spacing)) for spacing in (None, "paper")))


def test_a_payload_of_version_1_gives_the_picture_that_it_gave(make_runner: MakeRunner, make_request: MakeRequest) -> None:
    text = '{"class_labels": [0], "guidance_interval": [0.0, 1.0], "guidance_scale": 2.0, "model": "tiny", "sampler": "euler", "seed": 7, '
    request = GenerationRequest.parse(text + '"steps": 3}')
    assert request == make_request(), "nothing of what later versions brought"
    runner = make_runner()
    torch.testing.assert_close(by_itself(runner, request)[0], reference_latents(runner, make_request())[0], rtol=1e-4, atol=1e-4)


# --- guidance ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "interval", "rows"),
    [
        (1.0, (0.0, 1.0), [4, 4, 4, 4]),
        (2.0, (0.0, 1.0), [8, 8, 8, 8]),
        (2.0, (0.25, 0.5), [4, 4, 8, 8]),  # Euler's times are 1, 3/4, 1/2, 1/4; both ends are in
        (2.0, (0.6, 1.0), [8, 8, 4, 4]),
        (2.0, (0.3, 0.4), [4, 4, 4, 4]),
        (2.0, (0.5, 0.5), [4, 4, 8, 4]),
        (2.0, (1.0, 1.0), [8, 4, 4, 4]),
    ],
)
def test_guidance_costs_a_second_row_only_where_it_acts(
    make_runner: MakeRunner, make_request: MakeRequest, scale: float, interval: tuple[float, float], rows: list[int]
) -> None:
    runner = make_runner()
    forwards = rows_of_forwards(runner)
    Play(runner).run([(0, make_request(class_labels=(0, 1, 2, 3), guidance_scale=scale, guidance_interval=interval, steps=4))])
    assert forwards == rows


def rows_of_forwards(runner: Runner) -> list[int]:
    """Rows of every call of the network from now on."""
    rows: list[int] = []
    runner.checkpoint.dit.x_embedder.register_forward_pre_hook(lambda module, given: rows.append(given[0].shape[0]))
    return rows


def test_unconditional_pictures_cost_one_row_each_whatever_the_scale(make_runner: MakeRunner, make_request: MakeRequest) -> None:
    runner = make_runner()
    forwards = rows_of_forwards(runner)
    Play(runner).run([(0, make_request(class_labels=(None,) * 4, guidance_scale=5.0))])
    assert forwards == [4, 4, 4]
    one, other = (by_itself(runner, make_request(class_labels=(None,), guidance_scale=scale)) for scale in (1.0, 6.0))
    assert same(one, other), "it is the same picture at any scale"


def test_an_interval_that_no_step_falls_into_gives_the_unguided_picture(make_runner: MakeRunner, make_request: MakeRequest) -> None:
    runner = make_runner()
    plain, outside, guided = (
        by_itself(runner, make_request(guidance_scale=scale, guidance_interval=interval))
        for scale, interval in [(1.0, (0.0, 1.0)), (5.0, (0.0, 0.1)), (5.0, (0.0, 1.0))]
    )
    assert same(plain, outside)
    assert not same(plain, guided)


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_a_picture_that_is_not_guided_is_left_by_guidance_as_it_is(
    make_runner: MakeRunner, make_request: MakeRequest, rescale: float
) -> None:
    """It goes through guidance with scale 1 and its own row twice."""
    runner = make_runner()
    plain = make_request(guidance_scale=1.0)
    rescaled = make_request(guidance_scale=1.0, guidance_rescale=rescale, guidance_channels=FIRST_THREE_CHANNELS)
    assert same(by_itself(runner, plain), by_itself(runner, rescaled))
    torch.testing.assert_close(by_itself(runner, plain)[0], reference_latents(runner, plain)[0], rtol=1e-4, atol=1e-4)


def test_seed_class_and_steps_each_change_the_picture(make_runner: MakeRunner, make_request: MakeRequest) -> None:
    runner = make_runner()
    plain = by_itself(runner, make_request())
    for change in ({"seed": 8}, {"class_labels": (1,)}, {"steps": 4}, {"guidance_scale": 3.0}, {"seed": LARGEST_SEED}):
        assert not same(plain, by_itself(runner, make_request(**change))), change


# --- slots -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("objective", "sampler"), EVERY_SAMPLER, ids=[name for _, name in EVERY_SAMPLER])
def test_nothing_of_the_picture_before_is_left_in_a_slot(
    make_runner: MakeRunner, make_request: MakeRequest, objective: str, sampler: str
) -> None:
    runner, request = make_runner(objective), make_request(sampler=sampler)
    clean = by_itself(runner, request)
    runner.state.fill_(float("nan"))  # also the slot of the rows that pad
    assert same(clean, by_itself(runner, request))


@pytest.mark.parametrize(
    ("objective", "leaver", "sampler"),
    [("flow", "heun", "ab2"), ("flow", "ab2", "euler"), ("diffusion", "sde-dpm-solver++", "dpm-solver++")],
)
def test_a_slot_that_a_sampler_of_two_latents_left_midway_starts_clean(
    make_runner: MakeRunner, make_request: MakeRequest, objective: str, leaver: str, sampler: str
) -> None:
    runner = make_runner(objective, max_rows=2)  # one guided picture a tick, and the slot last freed is the first taken
    request = make_request(sampler=sampler, steps=5)
    clean = by_itself(runner, request)
    slots: list[int] = []

    def watch(tick: int, batch: list[Picture]) -> None:
        slots.extend(picture.slot for picture in batch)
        if tick in (1, 3):  # Heun remembers within a step, the others from the first on
            assert bool(runner.state[slots[0], 1].any()) == (tick == 1)

    after = Play(runner, before_step=watch).run([(0, make_request(sampler=leaver, steps=5, seed=1)), (3, request)], leaves={"0": 3})
    assert same(clean, after["1", 0]) and len(set(slots)) == 1


def test_pictures_that_pause_keep_their_latents(make_runner: MakeRunner, make_request: MakeRequest) -> None:
    """Fifteen pictures of three jobs in forwards of four rows."""
    runner, labels = make_runner(max_rows=4), (0, 1, 2, None, 3)
    samplers = ("heun", "ab2", "euler")
    joins = [(2 * i, make_request(class_labels=labels, sampler=name, steps=4, seed=20 * i)) for i, name in enumerate(samplers)]
    play = Play(runner)
    found = play.run(joins)
    assert max(play.rows) == 4 and len(found) == 15
    for (name, index), picture in found.items():
        assert same(picture, by_itself(runner, joins[int(name)][1], index))


def test_latents_that_a_sampler_does_not_keep_stay_zero(make_runner: MakeRunner, make_request: MakeRequest) -> None:
    """With noise too, beside a picture whose sampler does keep one."""
    runner = make_runner("diffusion")
    joins = [(0, make_request(sampler="ddpm", steps=4)), (0, make_request(sampler="sde-dpm-solver++", steps=4))]

    def watch(tick: int, batch: list[Picture]) -> None:
        for picture in batch:
            kept = runner.state[picture.slot, 1]
            assert bool(kept.any()) == (tick > 0 and picture.job.id == "1")

    Play(runner, before_step=watch).run(joins)


# --- when something goes wrong -----------------------------------------------------------------------------------------


def test_a_latent_that_leaves_the_finite_numbers_is_told_gives_no_picture_and_spoils_no_other(
    make_runner: MakeRunner, make_request: MakeRequest
) -> None:
    runner = make_runner()
    request = make_request(class_labels=(0, 1, 2))
    clean = Play(runner).run([(0, request)])

    def poison(tick: int, batch: list[Picture]) -> None:
        if tick == 1:
            runner.state[batch[1].slot] = float("nan")

    play = Play(runner, before_step=poison)
    poisoned = play.run([(0, request)])
    assert play.lost == [("0", 1)] * 2, "at both steps that were left"
    assert poisoned["0", 1][1] is None
    assert same(clean["0", 0], poisoned["0", 0]) and same(clean["0", 2], poisoned["0", 2])
    assert same(clean["0", 1], by_itself(runner, request, 1)), "nor any that comes after it"


def test_a_step_that_throws_writes_nothing(make_runner: MakeRunner, make_request: MakeRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = make_runner()
    clean = by_itself(runner, make_request())

    def fail_once(tick: int, batch: list[Picture]) -> None:
        if tick == 1:
            with monkeypatch.context() as broken:
                broken.setattr(runner.checkpoint.dit.final_layer, "forward", lambda x, condition: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    runner.step(batch)

    play = Play(runner, before_step=fail_once)
    assert same(clean, play.run([(0, make_request())])["0", 0]) and play.lost == []


def test_the_rows_are_halved_down_to_the_fewest(make_runner: MakeRunner, make_request: MakeRequest) -> None:
    runner = make_runner(max_rows=16)
    clean = by_itself(runner, make_request())
    assert [runner.halve(), runner.max_rows, runner.buckets] == [True, 8, [2, 3, 4, 6, 8]]
    assert [runner.halve(), runner.max_rows, runner.buckets] == [True, 4, [2, 3, 4]]
    assert [runner.halve(), runner.max_rows, runner.buckets] == [False, 4, [2, 3, 4]]
    assert same(clean, by_itself(runner, make_request()))


def test_a_device_that_answers_is_healthy_and_one_that_does_not_is_not(
    make_runner: MakeRunner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runner = make_runner()
    assert runner.healthy()

    def dead(*arguments: object, **options: object) -> Tensor:
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(torch, "zeros", dead)
    assert not runner.healthy() and "device-side assert" in caplog.text


# --- decoding ----------------------------------------------------------------------------------------------------------


def test_more_pictures_than_the_largest_decode_are_decoded_in_parts(make_runner: MakeRunner, make_request: MakeRequest) -> None:
    runner = make_runner(max_rows=64)
    assert runner.decode_buckets[-1] == 16
    request = make_request(class_labels=(0, 1, 2, 3) * 10, guidance_scale=1.0)
    pictures = Play(runner).run([(0, request)])
    for index in (0, 15, 16, 39):
        assert same(pictures["0", index], by_itself(runner, request, index))


# --- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_labels": (4,)}, r"class labels are 0 … 3, got 4"),
        ({"class_labels": (0, -1)}, r"got -1"),
        ({"sampler": "ddim"}, r"'ddim' does not fit this model \(flow\), which has: euler, heun, ab2"),
        ({"spacing": "paper"}, r"spacing 'paper' is for diffusion"),
        ({"eta": 0.5}, r"eta .* belongs to the sampler ddim, got 0.5 for euler"),
        ({"steps": 1001}, r"steps must be between 1 and 1000, got 1001"),
    ],
)
def test_what_the_model_cannot_do_is_a_value_error(
    make_runner: MakeRunner, make_request: MakeRequest, change: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_runner().plan(make_request(**change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shift": 2.0}, r"shift is for flow models; this one has spacing: paper, leading, trailing, log-snr"),
        ({"spacing": "karras"}, r"no spacing 'karras'; there is: paper, leading, trailing, log-snr"),
        ({"sampler": "ddpm"}, r"'ddpm' does not fit this model \(diffusion\), which has: ddpm-small, ddpm-large, ddim"),
    ],
)
def test_what_a_diffusion_cannot_do_is_a_value_error(
    make_runner: MakeRunner, make_request: MakeRequest, change: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_runner("diffusion", learn_sigma=False).plan(make_request(**{"sampler": "ddim", **change}))


def test_a_checkpoint_without_a_vae_is_refused(make_runner: MakeRunner) -> None:
    checkpoint = make_runner().checkpoint
    checkpoint.vae = None
    with pytest.raises(ValueError, match="no VAE"):
        Runner(checkpoint, max_rows=8, compile=False)


# --- warming up --------------------------------------------------------------------------------------------------------


def test_a_bucket_that_gives_other_bits_is_not_used(
    make_runner: MakeRunner, make_request: MakeRequest, caplog: pytest.LogCaptureFixture
) -> None:
    runner = make_runner(max_rows=16)
    linear = runner.checkpoint.dit.final_layer.linear
    linear.register_forward_hook(lambda module, given, out: out * (1.001 if out.shape[0] == 4 else 1.0))
    runner.warm_up()
    assert runner.buckets == [2, 3, 6, 8, 12, 16]
    assert "forward buckets [4] of [2, 3, 4, 6, 8, 12, 16] give other bits and are left out" in caplog.text
    joins = [(i, make_request(steps=6, seed=i, class_labels=(i % 4,))) for i in range(5)]
    crowd = Play(runner).run(joins)
    assert all(same(crowd[str(i), 0], by_itself(runner, request)) for i, (_, request) in enumerate(joins))


def test_rows_that_depend_on_their_place_everywhere_are_said_in_the_log(make_runner: MakeRunner, caplog: pytest.LogCaptureFixture) -> None:
    runner = make_runner(max_rows=8)
    linear = runner.checkpoint.dit.final_layer.linear
    linear.register_forward_hook(lambda module, given, out: out * (1 + 1e-3 * torch.arange(len(out)).view(-1, 1, 1)))
    runner.warm_up(choose_threads=False)
    assert runner.buckets == [2, 3, 4, 6, 8] and "a row's bits depend on its place" in caplog.text


def test_a_reproducible_runner_has_one_shape_of_forward_and_decode(
    build_checkpoint: Callable[..., object], make_request: MakeRequest, make_runner: MakeRunner
) -> None:
    runner = Runner(build_checkpoint(), max_rows=16, compile=False, reproducible=True)
    runner.warm_up()
    assert runner.buckets == [16] and runner.decode_buckets == [16]
    forwards = rows_of_forwards(runner)
    alone_here = by_itself(runner, make_request())
    assert forwards == [16, 16, 16] and not runner.halve()
    assert same(alone_here, by_itself(make_runner(max_rows=16), make_request()))


def test_warming_up_leaves_no_picture_behind_and_tells_how_long_a_tick_takes(make_runner: MakeRunner) -> None:
    runner = make_runner(max_rows=16)
    assert not runner.state.any() and runner.slowest_tick_s > 0
    assert runner.slots == 64, "four started pictures for each row"


def test_three_threads_are_given_up_where_rows_depend_on_their_place(make_runner: MakeRunner, make_request: MakeRequest) -> None:
    torch.set_num_threads(3)
    runner = make_runner(max_rows=16)
    assert torch.get_num_threads() in (1, 2, 3)
    request = make_request(class_labels=(0, 1, 2, None), steps=3)
    crowd = Play(runner).run([(0, request)])
    assert all(same(crowd["0", i], by_itself(runner, alone(request, i))) for i in range(4))
