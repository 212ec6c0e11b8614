"""The promise of the service: the same request gives the same picture, alone and in any crowd, and it is the reference sampler's."""

import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._inductor import config as inductor_config

from model.checkpoint import Checkpoint
from model.config import ObjectiveConfig
from model.samplers import DIFFUSION, FLOW, MAX_STATES, build_table
from model.sampling import sample
from model.spacing import SPACINGS
from worker.protocol import ALL_CHANNELS, FIRST_THREE_CHANNELS, LARGEST_SEED, GenerationRequest
from worker.runner import Runner, affordable, alike_buckets, can_compile, make_plan, row_buckets, steady_threads
from worker.scheduler import Job, Picture, Scheduler

Pictures = dict[tuple[str, int], tuple[Tensor, np.ndarray | None]]  # (job, index) → latents, pixels
SAMPLERS = {"flow": list(FLOW), "diffusion": list(DIFFUSION)}
EVERY_SAMPLER = [(objective, sampler) for objective, names in SAMPLERS.items() for sampler in names]
LABELS = [0, 1, 2, 3, None]


@dataclass
class Play:
    """Jobs that join and leave at given ticks, on the scheduler and a runner; the engine without its encoder."""

    runner: Runner
    rng: random.Random | None = None  # shuffles the places of the batch
    before_step: Callable[[int, list[Picture]], None] = lambda tick, batch: None
    rows: list[int] = field(default_factory=list)  # of each tick, without padding
    pictures: Pictures = field(default_factory=dict)

    def run(self, joins: Sequence[tuple[int, GenerationRequest]], leaves: dict[str, int] | None = None) -> Pictures:
        """Jobs are called by their place in `joins`."""
        scheduler, leaves = Scheduler(self.runner.max_rows), leaves or {}
        last = max(tick for tick, _ in joins)
        tick = 0
        while tick <= last or scheduler.batch() or any(job.waiting for job in scheduler.jobs.values()):
            for name, (when, request) in enumerate(joins):
                if when == tick:
                    scheduler.add(self._job(str(name), request))
            for name, when in leaves.items():
                if when == tick:
                    scheduler.remove(name)
            self._tick(scheduler, tick)
            tick += 1
        return self.pictures

    def _job(self, name: str, request: GenerationRequest) -> Job:
        plan = self.runner.plan(request)
        return Job(name, request.class_labels, request.seed, request.guidance_scale, plan.guided, plan)

    def _tick(self, scheduler: Scheduler, tick: int) -> None:
        self.runner.start(scheduler.admit())
        batch = scheduler.batch()
        if not batch:
            return
        if self.rng:
            self.rng.shuffle(batch)
        self.before_step(tick, batch)
        self.rows.append(sum(picture.rows for picture in batch))
        self.runner.step(batch)
        for picture in batch:
            picture.evaluation += 1
        done = [picture for picture in batch if picture.done]
        for picture, pixels in zip(done, self.runner.decode(done), strict=True):
            self.pictures[picture.job.id, picture.index] = self.runner.state[picture.slot, 0].clone(), pixels
            scheduler.retire(picture)


def alone(request: GenerationRequest, index: int) -> GenerationRequest:
    """The request for one picture of a job."""
    return replace(request, class_labels=(request.class_labels[index],), seed=request.seed + index)


def random_request(rng: random.Random, objective: str) -> GenerationRequest:
    sampler = rng.choice(SAMPLERS[objective])
    return GenerationRequest(
        model="tiny",
        class_labels=tuple(rng.choices(LABELS, k=rng.choice([1, 1, 2, 3, 5]))),
        guidance_scale=rng.choice([1.0, 1.0, 1.3, 2.0, 7.5]),
        guidance_interval=rng.choice([(0.0, 1.0), (0.0, 1.0), (0.2, 0.7), (0.0, 0.0)]),
        steps=rng.randint(1, 6),
        sampler=sampler,
        seed=rng.choice([rng.randrange(100), rng.randrange(LARGEST_SEED - 4)]),
        spacing=rng.choice([None, *SPACINGS]) if objective == "diffusion" else None,
        eta=rng.choice([0.0, 0.3, 1.0]) if sampler == "ddim" else 0.0,
        shift=rng.choice([1.0, 0.5, 3.0]) if objective == "flow" else 1.0,
        guidance_channels=rng.choice([ALL_CHANNELS, FIRST_THREE_CHANNELS]),
        guidance_rescale=rng.choice([0.0, 0.0, 0.4, 1.0]),
    )


def reference(runner: Runner, request: GenerationRequest) -> np.ndarray:
    """Pixels (B, H, W, channels) of `model.sampling.sample` for the same request."""
    return sample(
        runner.checkpoint,
        request.class_labels,
        steps=request.steps,
        guidance_scale=request.guidance_scale,
        sampler=request.sampler,
        seeds=range(request.seed, request.seed + request.num_images),
        spacing=request.spacing,
        eta=request.eta,
        shift=request.shift,
        guidance_interval=request.guidance_interval,
        guidance_channels=3 if request.guidance_channels == FIRST_THREE_CHANNELS else None,
        guidance_rescale=request.guidance_rescale,
    ).numpy()


def same(one: tuple[Tensor, np.ndarray | None], other: tuple[Tensor, np.ndarray | None]) -> bool:
    assert one[1] is not None and other[1] is not None, "a picture left the finite numbers"
    return torch.equal(one[0], other[0]) and np.array_equal(one[1], other[1])


def assert_a_crowd_changes_nothing(runner: Runner, objective: str, seeds: Sequence[int], jobs: int = 10) -> None:
    """Random crowds; every picture that ended is compared with itself alone."""
    for seed in seeds:
        rng = random.Random(seed)
        joins = [(rng.randint(0, 8), random_request(rng, objective)) for _ in range(jobs)]
        leaves = {str(name): when + rng.randint(0, 3) for name, (when, _) in enumerate(joins) if rng.random() < 0.15}
        pictures = Play(runner, rng).run(joins, leaves)
        stayed = {(str(name), i) for name, (_, r) in enumerate(joins) if str(name) not in leaves for i in range(r.num_images)}
        assert stayed <= set(pictures), "whoever stays gets a picture"
        for (name, index), picture in pictures.items():
            request = alone(joins[int(name)][1], index)
            by_itself = Play(runner).run([(0, request)])["0", 0]
            assert same(picture, by_itself), f"crowd {seed}: {request} differs from itself alone"


@pytest.fixture
def two_threads() -> Iterator[None]:
    """The CPU's kernels share rows out among threads, and so depend most on how many rows there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@DTYPES
@pytest.mark.parametrize("objective", ["flow", "diffusion"])
@pytest.mark.usefixtures("two_threads")
def test_a_picture_alone_is_bit_for_bit_the_same_in_any_crowd(
    make_runner: Callable[..., Runner], objective: str, dtype: torch.dtype
) -> None:
    assert_a_crowd_changes_nothing(make_runner(objective, dtype, max_rows=16), objective, seeds=[1, 2, 3])


@DTYPES
@pytest.mark.usefixtures("two_threads")
def test_every_number_of_rows_gives_the_same_picture(
    make_runner: Callable[..., Runner], make_request: Callable[..., GenerationRequest], dtype: torch.dtype
) -> None:
    runner = make_runner(dtype=dtype, max_rows=16)
    joins = [(i, make_request(steps=17 - i, guidance_scale=1.0, class_labels=(LABELS[i % 5],), seed=i)) for i in range(16)]
    crowd = Play(runner)
    pictures = crowd.run(joins)
    assert crowd.rows == [*range(1, 17), 16], "each tick one more"
    for name, (_, request) in enumerate(joins):
        assert same(pictures[str(name), 0], Play(runner).run([(0, request)])["0", 0]), f"it joined at {name + 1} rows"


@pytest.mark.parametrize("max_rows", [2, 3, 5, 10])
@pytest.mark.usefixtures("two_threads")
def test_a_crowd_changes_nothing_whatever_the_most_rows(make_runner: Callable[..., Runner], max_rows: int) -> None:
    assert_a_crowd_changes_nothing(make_runner(max_rows=max_rows), "flow", seeds=[max_rows], jobs=6)


def test_a_crowd_changes_nothing_on_one_thread(make_runner: Callable[..., Runner], two_threads: None) -> None:
    torch.set_num_threads(1)
    assert_a_crowd_changes_nothing(make_runner(), "flow", seeds=[4], jobs=8)


def test_colour_pictures_keep_the_promise(make_runner: Callable[..., Runner], two_threads: None) -> None:
    assert_a_crowd_changes_nothing(make_runner(image_channels=3), "flow", seeds=[5], jobs=6)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch's own, on the way to its compiler
@pytest.mark.skipif(not can_compile(torch.device("cpu")) and not os.environ.get("CI"), reason="there is no C++ compiler here")
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("two_threads")
def test_a_compiled_model_keeps_the_promise(make_runner: Callable[..., Runner], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor_config, "compile_threads", 1)  # else it starts a pool of processes that each load torch
    runner = make_runner(compile=True, depth=1)
    assert runner.buckets == [4, 8]
    assert_a_crowd_changes_nothing(runner, "flow", seeds=[6, 7])


def test_three_threads_keep_the_promise_too(make_runner: Callable[..., Runner], two_threads: None) -> None:
    """Rows shared out among three threads have bits that depend on their place, so the warm-up settles for two."""
    torch.set_num_threads(3)
    runner = make_runner(max_rows=16)
    assert_a_crowd_changes_nothing(runner, "flow", seeds=[8])


@DTYPES
@pytest.mark.parametrize("objective", ["flow", "diffusion"])
@pytest.mark.usefixtures("two_threads")
def test_a_picture_alone_is_bit_for_bit_that_of_the_reference_sampler(
    make_runner: Callable[..., Runner], objective: str, dtype: torch.dtype
) -> None:
    """Every sampler three times, each time with other spacing, shift, interval, channels and rescale."""
    runner, rng = make_runner(objective, dtype), random.Random(0)
    for sampler in SAMPLERS[objective] * 3:
        drawn = alone(random_request(rng, objective), 0)
        request = replace(drawn, sampler=sampler, eta=drawn.eta if sampler == "ddim" else 0.0)
        _, pixels = Play(runner).run([(0, request)])["0", 0]
        assert pixels is not None and pixels.std() > 1, "the picture shows something"
        assert np.array_equal(pixels, reference(runner, request)[0]), request


@pytest.mark.parametrize(("objective", "sampler"), EVERY_SAMPLER, ids=[name for _, name in EVERY_SAMPLER])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_pictures_together_are_those_of_the_reference_sampler(
    make_runner: Callable[..., Runner], make_request: Callable[..., GenerationRequest], objective: str, sampler: str, scale: float
) -> None:
    """One grey level, since the reference pads neither five rows nor their decode."""
    runner = make_runner(objective, max_rows=16)
    request = make_request(class_labels=(0, 1, 2, 3, None), guidance_scale=scale, steps=5, sampler=sampler, seed=11)
    pictures = Play(runner).run([(0, request)])
    ours = np.stack([pictures["0", i][1] for i in range(5)])
    assert np.abs(ours.astype(int) - reference(runner, request)).max() <= 1


def test_every_choice_of_guidance_spacing_and_noise_changes_the_picture(
    make_runner: Callable[..., Runner], make_request: Callable[..., GenerationRequest]
) -> None:
    for objective, plain, changes in [
        ("flow", make_request(steps=4), [{"shift": 3.0}, {"shift": 0.5}]),
        ("diffusion", make_request(steps=4, sampler="ddim"), [{"spacing": name} for name in ("leading", "trailing", "log-snr")]),
        ("diffusion", make_request(steps=4, sampler="ddim"), [{"eta": 0.2}, {"eta": 0.9}]),
    ]:
        runner = make_runner(objective)
        changes += [{"guidance_channels": FIRST_THREE_CHANNELS}, {"guidance_rescale": 0.3}, {"guidance_rescale": 1.0}]
        changes += [{"sampler": name} for name in SAMPLERS[objective] if name != plain.sampler]
        seen: dict[bytes, list[dict[str, object]]] = {}
        for change in [{}, *changes]:
            latents, _ = Play(runner).run([(0, replace(plain, **change))])["0", 0]
            seen.setdefault(latents.numpy().tobytes(), []).append(change)
        assert [alike for alike in seen.values() if len(alike) > 1] == []


def test_the_papers_spacing_is_what_a_request_without_one_gets(
    make_runner: Callable[..., Runner], make_request: Callable[..., GenerationRequest]
) -> None:
    runner = make_runner("diffusion")
    one, other = (Play(runner).run([(0, make_request(sampler="ddim", spacing=spacing))])["0", 0] for spacing in (None, "paper"))
    assert same(one, other)


def test_a_payload_of_version_1_gives_the_picture_that_it_gave(
    make_runner: Callable[..., Runner], make_request: Callable[..., GenerationRequest]
) -> None:
    text = '{"class_labels": [0], "guidance_interval": [0.0, 1.0], "guidance_scale": 2.0, "model": "tiny", "sampler": "euler", "seed": 7, '
    request = GenerationRequest.parse(text + '"steps": 3}')
    assert request == make_request(), "nothing of what version 2 brought"
    runner = make_runner()
    _, pixels = Play(runner).run([(0, request)])["0", 0]
    plain = sample(runner.checkpoint, [0], steps=3, guidance_scale=2.0, sampler="euler", seeds=[7])
    assert pixels is not None and np.array_equal(pixels, plain[0].numpy())


@dataclass
class Counting:
    """The forward, and the rows of each call."""

    forward: Callable[[Tensor, Tensor, Tensor], Tensor]
    rows: list[int] = field(default_factory=list)

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.rows.append(x.shape[0])
        return self.forward(x, t, y)


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
    make_runner: Callable[..., Runner],
    make_request: Callable[..., GenerationRequest],
    scale: float,
    interval: tuple[float, float],
    rows: list[int],
) -> None:
    runner = make_runner()
    runner._forward = Counting(runner._forward)
    request = make_request(class_labels=(0, 1, 2, 3), guidance_scale=scale, guidance_interval=interval, steps=4)
    Play(runner).run([(0, request)])
    assert runner._forward.rows == rows


def test_an_interval_that_no_step_falls_into_gives_the_unguided_picture(
    make_runner: Callable[..., Runner], make_request: Callable[..., GenerationRequest]
) -> None:
    runner = make_runner()
    plain, outside, guided = (
        Play(runner).run([(0, make_request(guidance_scale=scale, guidance_interval=interval))])["0", 0]
        for scale, interval in [(1.0, (0.0, 1.0)), (5.0, (0.0, 0.1)), (5.0, (0.0, 1.0))]
    )
    assert same(plain, outside)
    assert not same(plain, guided)


def test_the_unconditional_picture_is_the_same_at_any_guidance(
    make_runner: Callable[..., Runner], make_request: Callable[..., GenerationRequest]
) -> None:
    runner = make_runner()
    one, other = (Play(runner).run([(0, make_request(class_labels=(None,), guidance_scale=scale))])["0", 0] for scale in (1.0, 6.0))
    assert torch.allclose(one[0], other[0], atol=1e-5)


def test_seed_class_and_steps_each_change_the_picture(
    make_runner: Callable[..., Runner], make_request: Callable[..., GenerationRequest]
) -> None:
    runner = make_runner()
    plain = Play(runner).run([(0, make_request())])["0", 0]
    for change in ({"seed": 8}, {"class_labels": (1,)}, {"steps": 4}, {"guidance_scale": 3.0}, {"seed": LARGEST_SEED}):
        assert not same(plain, Play(runner).run([(0, make_request(**change))])["0", 0]), change


@pytest.mark.parametrize(("objective", "sampler"), EVERY_SAMPLER, ids=[name for _, name in EVERY_SAMPLER])
def test_nothing_of_the_picture_before_is_left_in_a_slot(
    make_runner: Callable[..., Runner], make_request: Callable[..., GenerationRequest], objective: str, sampler: str
) -> None:
    runner, request = make_runner(objective), make_request(sampler=sampler)
    clean = Play(runner).run([(0, request)])["0", 0]
    runner.state.fill_(float("nan"))
    assert same(clean, Play(runner).run([(0, request)])["0", 0])


@pytest.mark.parametrize(
    ("objective", "leaver", "sampler"),
    [("flow", "heun", "ab2"), ("flow", "ab2", "euler"), ("diffusion", "sde-dpm-solver++", "dpm-solver++")],
)
def test_a_slot_that_a_sampler_of_two_latents_left_midway_starts_clean(
    make_runner: Callable[..., Runner], make_request: Callable[..., GenerationRequest], objective: str, leaver: str, sampler: str
) -> None:
    runner = make_runner(objective, max_rows=2)  # one slot for a guided picture, the last freed is the first taken
    request = make_request(sampler=sampler, steps=5)
    clean = Play(runner).run([(0, request)])["0", 0]
    slots: list[int] = []

    def watch(tick: int, batch: list[Picture]) -> None:
        slots.extend(picture.slot for picture in batch)
        if tick in (1, 3):  # Heun remembers within a step, the others from the first on
            assert bool(runner.state[slots[0], 1].any()) == (tick == 1)

    after = Play(runner, before_step=watch).run([(0, make_request(sampler=leaver, steps=5, seed=1)), (3, request)], leaves={"0": 3})
    assert same(clean, after["1", 0]) and len(set(slots)) == 1


def test_latents_that_a_sampler_does_not_keep_stay_zero(
    make_runner: Callable[..., Runner], make_request: Callable[..., GenerationRequest]
) -> None:
    """With noise too, beside a picture whose sampler does keep one."""
    runner = make_runner("diffusion")
    joins = [(0, make_request(sampler="ddpm", steps=4)), (0, make_request(sampler="sde-dpm-solver++", steps=4))]

    def watch(tick: int, batch: list[Picture]) -> None:
        for picture in batch:
            kept = runner.state[picture.slot, 1]
            assert bool(kept.any()) == (tick > 0 and picture.job.id == "1")

    Play(runner, before_step=watch).run(joins)


def test_a_latent_that_leaves_the_finite_numbers_gives_no_picture_and_spoils_no_other(
    make_runner: Callable[..., Runner], make_request: Callable[..., GenerationRequest]
) -> None:
    runner = make_runner()
    request = make_request(class_labels=(0, 1, 2))
    clean = Play(runner).run([(0, request)])

    def poison(tick: int, batch: list[Picture]) -> None:
        if tick == 1:
            runner.state[batch[1].slot] = float("nan")

    poisoned = Play(runner, before_step=poison).run([(0, request)])
    assert poisoned["0", 1][1] is None
    assert same(clean["0", 0], poisoned["0", 0]) and same(clean["0", 2], poisoned["0", 2])


def test_a_step_that_throws_writes_nothing(make_runner: Callable[..., Runner], make_request: Callable[..., GenerationRequest]) -> None:
    runner = make_runner()
    clean = Play(runner).run([(0, make_request())])["0", 0]
    forward = runner._forward

    def fail_once(tick: int, batch: list[Picture]) -> None:
        if tick == 1:
            runner._forward = lambda x, t, y: 1 / 0
            with pytest.raises(ZeroDivisionError):
                runner.step(batch)
            runner._forward = forward

    assert same(clean, Play(runner, before_step=fail_once).run([(0, make_request())])["0", 0])


def test_more_pictures_than_the_largest_decode_are_decoded_in_parts(
    make_runner: Callable[..., Runner], make_request: Callable[..., GenerationRequest]
) -> None:
    runner = make_runner(max_rows=64)
    assert runner.decode_buckets[-1] == 16
    request = make_request(class_labels=(0, 1, 2, 3) * 10, guidance_scale=1.0)
    pictures = Play(runner).run([(0, request)])
    for index in (0, 15, 16, 39):
        assert same(pictures["0", index], Play(runner).run([(0, alone(request, index))])["0", 0])


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
    make_runner: Callable[..., Runner], make_request: Callable[..., GenerationRequest], change: dict[str, object], message: str
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
    make_runner: Callable[..., Runner], make_request: Callable[..., GenerationRequest], change: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_runner("diffusion", learn_sigma=False).plan(make_request(**{"sampler": "ddim", **change}))


@pytest.mark.parametrize(
    ("objective", "sampler", "noisy"),
    [
        ("diffusion", "ddpm", [True] * 4 + [False]),  # the last step adds no noise
        ("diffusion", "sde-dpm-solver++", [True] * 4 + [False]),
        ("diffusion", "dpm-solver++", [False] * 5),
        ("flow", "ab2", [False] * 5),
        ("flow", "heun", [False] * 9),
    ],
)
def test_a_plan_has_one_row_of_plain_numbers_per_evaluation(
    make_runner: Callable[..., Runner], make_request: Callable[..., GenerationRequest], objective: str, sampler: str, noisy: list[bool]
) -> None:
    plan = make_runner(objective).plan(make_request(sampler=sampler, steps=5))
    assert [len(column) for column in (plan.t, plan.coefficients, plan.guided)] == [len(noisy)] * 3 and plan.noisy == noisy
    assert {len(row) for row in plan.coefficients} == {MAX_STATES**2 + MAX_STATES + 3}
    assert (plan.t[0], plan.t[-1]) == ((999, 0) if objective == "diffusion" else (1, pytest.approx(0.2)))


@pytest.mark.parametrize(
    ("channels", "chosen", "moved"), [(4, ALL_CHANNELS, 4), (4, FIRST_THREE_CHANNELS, 3), (2, FIRST_THREE_CHANNELS, 2)]
)
def test_guidance_moves_all_channels_or_the_first_three(
    make_request: Callable[..., GenerationRequest], channels: int, chosen: str, moved: int
) -> None:
    table = build_table(ObjectiveConfig("flow"), "euler", 2)
    assert make_plan(table, make_request(guidance_channels=chosen), channels).guidance_channels == moved


def test_a_checkpoint_without_a_vae_is_refused(make_runner: Callable[..., Runner]) -> None:
    checkpoint = make_runner().checkpoint
    checkpoint.vae = None
    with pytest.raises(ValueError, match="no VAE"):
        Runner(checkpoint, max_rows=8, compile=False)


@pytest.mark.parametrize(("max_rows", "buckets"), [(2, [4]), (4, [4]), (5, [4, 8]), (8, [4, 8]), (10, [4, 8, 16]), (32, [4, 8, 16, 32])])
def test_buckets_are_powers_of_two_that_hold_the_most_rows(max_rows: int, buckets: list[int]) -> None:
    assert row_buckets(max_rows) == buckets


def test_a_bucket_whose_rows_differ_is_dropped() -> None:
    def run(rows: Tensor) -> Tensor:
        return rows + (1e-7 if len(rows) == 8 else 0.0)

    assert alike_buckets(run, [4, 8, 16]) == [4, 16]


def test_a_bucket_in_which_the_place_matters_is_dropped() -> None:
    def run(rows: Tensor) -> Tensor:
        outputs = rows.double()
        if len(rows) == 8:
            outputs[-1] += 1e-9  # another kernel takes the last row
        return outputs

    assert alike_buckets(run, [4, 8, 16]) == [4, 16]


def test_no_bucket_is_alike_where_the_place_matters_in_the_largest() -> None:
    assert alike_buckets(lambda rows: rows + torch.arange(len(rows)), [4, 8]) == []


@pytest.mark.parametrize(
    ("threads", "steady", "expected"), [(2, {1, 2}, 2), (3, {1, 2}, 2), (6, {1, 2, 4}, 4), (64, {1, 16}, 16), (5, {1}, 1)]
)
def test_threads_are_given_up_until_places_do_not_matter(threads: int, steady: set[int], expected: int) -> None:
    assert steady_threads(threads, lambda n: n in steady) == expected


def test_a_bucket_that_gives_other_bits_is_not_used_and_the_promise_holds(
    make_runner: Callable[..., Runner], caplog: pytest.LogCaptureFixture, two_threads: None
) -> None:
    runner = make_runner(max_rows=16)
    forward = runner._forward

    def uneven(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return forward(x, t, y) * (1.001 if x.shape[0] == 4 else 1.0)

    runner._forward = uneven
    runner.warm_up()
    assert runner.buckets == [8, 16]
    assert "forward buckets [4] of [4, 8, 16] give other bits and are left out" in caplog.text
    assert_a_crowd_changes_nothing(runner, "flow", seeds=[5], jobs=6)


def test_a_large_model_gets_small_batches(build_checkpoint: Callable[..., Checkpoint]) -> None:
    checkpoint = build_checkpoint("flow")
    assert affordable(checkpoint, limit_s=0.0, most_rows=32) == (4, 2)
    assert affordable(checkpoint, limit_s=1e6, most_rows=32) == (32, 16)
    runner = Runner(checkpoint, max_rows=32, max_decode=2, compile=False)
    runner.warm_up()
    assert runner.decode_buckets == [2] and runner.buckets[-1] == 32 and runner.slowest_tick_s > 0
