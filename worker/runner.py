"""The device: slots of latents, one DiT forward a tick over rows at different steps, decoding in batches.

Nothing here decides what runs; the scheduler does. A tick writes the numbers of each picture's own table row into two small matrices,
padded to a bucket of rows, and calls one function of them (worker/advance.py). On the CPU the buckets are checked at start to give every
row the same bits whatever its neighbours, so that a seed gives the same picture alone and in a crowd; a bucket that does not is left out.

On CUDA nothing here waits for the device but `lost()`, which stays `_RUN_AHEAD` ticks behind it, and a decoding's `result()`.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from model.checkpoint import Checkpoint
from model.dit import CONTEXT_TOKENS
from model.noise import normal
from model.samplers import build_table
from worker.advance import REAL, WHOLE, Advance, Captured, make_advance
from worker.decoder import Decoder, Decoding, bucket_of
from worker.device import FEWEST_ROWS, alike_buckets, elapsed, row_buckets, steady_threads
from worker.packed import pack_linears
from worker.plan import K, Plan, make_plan
from worker.prepared import Pair, PreparedTable
from worker.protocol import GenerationRequest
from worker.scheduler import Picture

log = logging.getLogger("dit.runner")

_SLOTS_PER_ROW = 4  # pictures that may have started for each row: the others pause
_STATE_BYTES = 1 << 30
PREVIEW_HALVED_FROM = 64  # pixels
_RUN_AHEAD = 2  # ticks that the device may be behind


@dataclass(frozen=True)
class _Flight:
    """A tick that the device may still be working on."""

    pictures: list[tuple[Picture, int]]  # with the attempt that stepped
    finite: Tensor  # on the host once `done`
    done: torch.cuda.Event | None


class Runner:
    """Holds one checkpoint on one device."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        max_rows: int,
        compile: bool,
        max_decode: int | None = None,
        reproducible: bool = False,
        block_cache: bool = False,
    ) -> None:
        """`reproducible`: every forward and every decode has the one largest shape, whatever the device's kernels do with others.
        `block_cache`: requests may ask for one, which costs memory and a second set of graphs.
        """
        if checkpoint.vae is None:
            raise ValueError("this checkpoint has no VAE, so it cannot be served")
        self.checkpoint, self.max_rows, self.compiled, self.reproducible = checkpoint, max_rows, compile, reproducible
        self.config, self.device = checkpoint.config.architecture, checkpoint.device
        c = self.config
        self.shape = (c.in_channels, c.input_size, c.input_size)
        self.buckets = row_buckets(max_rows, self.device)
        if compile:  # the network is the runner's own from here on
            for part in (checkpoint.dit.blocks, checkpoint.dit.final_layer):
                pack_linears(part, self.buckets[-1] * self.config.num_tokens)
        self.decoder = Decoder(checkpoint.vae, min(max_rows, max_decode or max_rows), self.device)
        picture_bytes = 4 * (K + 1) * c.in_channels * c.input_size**2
        self.slots = max(self.buckets[-1], min(_SLOTS_PER_ROW * max_rows, _STATE_BYTES // picture_bytes))
        self.state = torch.zeros(self.slots + 1, K, *self.shape, device=self.device)  # the last one pads
        self.clean = torch.zeros(self.slots + 1, *self.shape, device=self.device)  # what the last step took the latents to become
        self.prepared = PreparedTable(checkpoint.dit, self.buckets[-1], self.device)
        arguments, self.block_cache = (checkpoint.dit, self.state, self.clean, self.prepared.rows), block_cache
        self.changes = self._room_for_changes() if block_cache else None
        self._run: dict[bool, Advance] = {True: make_advance(*arguments, compile=compile, changes=self.changes)}  # do all blocks run?
        if block_cache:
            self._run[False] = make_advance(*arguments, compile=compile, changes=self.changes, reuse=True)
        self._captured: dict[tuple[bool, int], Captured] = {}
        self._flights: deque[_Flight] = deque()
        self.slowest_tick_s = 0.0  # the largest forward and the largest decode, measured by warm_up()
        self.rows_per_s = 0.0  # of full forwards, decoding aside, measured there too
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)  # a graph per bucket and checkpoint

    def _room_for_changes(self) -> Tensor:
        """Of every slot's conditional and null row: what the middle blocks add to its tokens, (slots + 1, 2, tokens, D)."""
        c, weight = self.config, self.checkpoint.dit.x_embedder.proj.weight
        tokens = c.num_tokens + (CONTEXT_TOKENS if c.block == "in-context" else 0)
        return torch.zeros(self.slots + 1, 2, tokens, c.hidden_size, dtype=weight.dtype, device=self.device)

    @property
    def decode_buckets(self) -> list[int]:
        return self.decoder.buckets

    def bucket(self, rows: int) -> int:
        """Rows of the forward that these are padded to."""
        return bucket_of(self.buckets, rows)

    # Before it serves.

    @torch.inference_mode()
    def warm_up(self, *, choose_threads: bool = True) -> None:
        """Run (and so compile) every bucket, and on the CPU keep the threads and buckets that give a row the same bits everywhere.

        Threads are a property of the process: a runner that is made beside another one takes what that one chose.
        """
        started = time.perf_counter()
        if self.device.type == "cpu":
            if choose_threads:  # before anything is compiled for a number of threads
                self._choose_threads()
            for all_blocks in self._run:
                self.buckets = self._steady("forward", self.buckets, partial(self._probe, all_blocks=all_blocks))
            self.decoder.buckets = self._steady("decode", self.decoder.buckets, self._probe_decode)
        if self.reproducible:
            self.buckets, self.decoder.buckets = self.buckets[-1:], self.decoder.buckets[-1:]
        if self.device.type == "cuda":
            self._capture()
        curve = {bucket: elapsed(partial(self._probe, torch.arange(bucket)), self.device) for bucket in self.buckets}
        decode_s = elapsed(partial(self._probe_decode, torch.arange(self.decoder.buckets[-1])), self.device)
        self.slowest_tick_s = max(curve.values()) + decode_s
        self.rows_per_s = self.max_rows / curve[self.buckets[-1]]
        self.state.zero_()
        times = ", ".join(f"{rows}: {1e3 * seconds:.1f} ms" for rows, seconds in curve.items())
        log.info("warm after %.1f s; a tick of rows %s; decode in %s", time.perf_counter() - started, times, self.decoder.buckets)

    @torch.inference_mode()
    def _capture(self) -> None:
        """A graph per bucket. They share memory, which is free again only when all of them are gone."""
        pool = torch.cuda.graph_pool_handle()
        for bucket in reversed(self.buckets):  # the largest first: the others fit into its memory
            for all_blocks, run in self._run.items():
                self._captured[all_blocks, bucket] = Captured(run, bucket, self.device, pool, self.slots)

    def _steady(self, name: str, buckets: list[int], run: Callable[[Tensor], Tensor]) -> list[int]:
        kept = alike_buckets(run, buckets)
        if not kept:
            log.error("%s: a row's bits depend on its place, so a seed may give slightly different pictures in a crowd", name)
        elif kept != buckets:
            log.warning("%s buckets %s of %s give other bits and are left out", name, sorted({*buckets} - {*kept}), buckets)
        return kept or buckets

    def _choose_threads(self) -> None:
        """The forward uncompiled stands for the compiled one: the same matrix kernels."""
        threads, largest = torch.get_num_threads(), [self.buckets[-1]]
        x, t, y = self._samples(self.buckets[-1])

        def steady(count: int) -> bool:
            torch.set_num_threads(count)
            forward = alike_buckets(lambda rows: self.checkpoint.dit(x[rows], t[rows], y[rows]), largest)
            return bool(forward and alike_buckets(self._probe_decode, self.decoder.buckets[-1:]))

        torch.set_num_threads(steady_threads(threads, steady))
        if torch.get_num_threads() < threads:
            log.warning("%d threads instead of %d, so that a seed gives one picture", torch.get_num_threads(), threads)

    def _samples(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, times and classes to try the network on, always the same."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(count, *self.shape, generator=generator)
        last = 1.0 if self.config.time_factor != 1.0 else float(self.checkpoint.config.objective.num_timesteps - 1)
        t = torch.rand(count, generator=generator) * last
        y = torch.randint(self.config.num_classes + 1, (count,), generator=generator)
        return x.to(self.device), t.to(self.device), y.to(self.device)

    def _probe(self, rows: Tensor, all_blocks: bool = True) -> Tensor:
        """A whole tick of samples `rows`, one unguided picture each: what comes out of the network plus noise, per row."""
        x, t, y = self._samples(self.buckets[-1])
        count = len(rows)
        self.state[:count, 0] = x[rows]
        if self.changes is not None:
            self.changes[:count] = rows.to(self.device).view(-1, 1, 1, 1) / len(x)
        pairs = list(zip(t.tolist(), y.tolist(), strict=True))
        found = self.prepared.find([pairs[i] for i in rows.tolist()], ())
        whole, real = np.zeros((count, len(WHOLE)), np.int64), np.zeros((count, len(REAL)), np.float32)
        whole.T[:] = [range(count), [0] * count, found, *[range(count)] * 3, rows.tolist(), [0] * count]
        real[:, REAL.index("b0")] = real[:, REAL.index("d")] = real[:, REAL.index("scale")] = 1
        self._launch(whole, real, all_blocks)
        return self.state[:count].clone()

    def _probe_decode(self, rows: Tensor) -> Tensor:
        return self.decoder.pixels(self._samples(self.decoder.buckets[-1])[0][rows.to(self.device)])

    # A tick.

    def plan(self, request: GenerationRequest) -> Plan:
        """ValueError if this model cannot do what the request asks."""
        wrong = [y for y in request.class_labels if y is not None and not 0 <= y < self.config.num_classes]
        if wrong:
            raise ValueError(f"class labels are 0 … {self.config.num_classes - 1}, got {wrong[0]}")
        if request.block_cache > 1 and not self.block_cache:
            raise ValueError("this worker has no block cache; DIT_BLOCK_CACHE=true gives it one")
        table = build_table(
            self.checkpoint.config.objective,
            request.sampler,
            request.steps,
            learn_sigma=self.config.learn_sigma,
            spacing=request.spacing,
            eta=request.eta,
            shift=request.shift,
        )
        return make_plan(table, request, self.config.in_channels)

    @torch.inference_mode()
    def start(self, pictures: Sequence[Picture]) -> None:
        """Fill the slots of pictures that begin with their initial noise."""
        if pictures:
            seeds = self._tensor([p.seed for p in pictures])
            slots = self._tensor([p.slot for p in pictures])
            self.state[slots] = 0  # what an earlier picture's sampler remembered
            self.state[slots, 0] = normal(seeds, torch.zeros_like(seeds), self.shape)

    def groups(self, pictures: Sequence[Picture]) -> list[list[Picture]]:
        """Those that can step in one forward: all of them, but for those whose middle blocks come from the block cache this time."""
        full = [p for p in pictures if p.job.plan.all_blocks[p.evaluation]]
        return [group for group in (full, [p for p in pictures if not p.job.plan.all_blocks[p.evaluation]]) if group]

    @torch.inference_mode()
    def step(self, pictures: Sequence[Picture]) -> None:
        """One evaluation for every picture of a group: one forward, one update. Nothing is written if anything throws.

        Rows are all conditional ones, then the null rows of those guided at this step.
        """
        count, all_blocks = len(pictures), pictures[0].job.plan.all_blocks[pictures[0].evaluation]
        guided = [i for i, p in enumerate(pictures) if p.guided]
        rows, bucket = count + len(guided), self.bucket(count + len(guided))
        null, plans = self.config.null_class, [(p.job.plan, p.evaluation) for p in pictures]
        times = [plan.t[i] for plan, i in plans]
        pairs = [(t, null if p.class_label is None else p.class_label) for t, p in zip(times, pictures, strict=True)]
        pairs += [(times[i], null) for i in guided]
        slots = [p.slot for p in pictures]
        other, scale = list(range(count)), [1.0] * count
        for row, i in enumerate(guided, start=count):
            other[i], scale[i] = row, pictures[i].job.guidance_scale
        whole, real = np.zeros((bucket, len(WHOLE)), np.int64), np.zeros((bucket, len(REAL)), np.float32)
        whole[:, 0] = whole[:, 3] = self.slots
        whole[:rows, 0] = [*slots, *(slots[i] for i in guided)]
        whole[count:rows, 1] = 1
        whole[:rows, 2] = self.prepared.find(pairs, self._ahead(pictures))
        whole[:count, 3:] = np.array([slots, range(count), other, [p.seed for p in pictures], [i + 1 for _, i in plans]]).T
        real[:count, :-3] = [plan.coefficients[i] for plan, i in plans]
        real[:count, -3] = scale
        real[:count, -2:] = [(plan.guidance_channels, plan.guidance_rescale) for plan, _ in plans]
        # What it takes to hear of the step is there before it: from the launch on, nothing may fail.
        landing = self._landing(count)
        stepped = [(picture, picture.attempt) for picture in pictures]
        finite = self._launch(whole, real, all_blocks)[:count]
        if landing is None:
            self._flights.append(_Flight(stepped, finite, None))
        else:
            host, done = landing
            host.copy_(finite, non_blocking=True)
            done.record()
            self._flights.append(_Flight(stepped, host, done))

    def _ahead(self, pictures: Sequence[Picture]) -> Iterator[Pair]:
        """The (time, class) pairs of the pictures' next evaluations, soonest first; alike pictures of a job are asked once."""
        null = self.config.null_class
        alike = {(p.job.id, p.class_label, p.evaluation): p for p in pictures}
        going = [(p, p.evaluation) for p in alike.values()]
        while going := [(p, i + 1) for p, i in going if i + 1 < p.job.evaluations]:
            for p, i in going:
                yield p.job.plan.t[i], null if p.class_label is None else p.class_label
                if p.job.guided[i]:
                    yield p.job.plan.t[i], null

    def _launch(self, whole: np.ndarray, real: np.ndarray, all_blocks: bool) -> Tensor:
        numbers = torch.from_numpy(whole), torch.from_numpy(real)
        if self.device.type != "cuda":
            return self._run[all_blocks](*numbers)
        pinned = [v.pin_memory() for v in numbers]  # freed for the next only after their copy: the caching allocator sees to it
        captured = self._captured.get((all_blocks, len(whole)))
        return captured(*pinned) if captured else self._run[all_blocks](*(v.to(self.device, non_blocking=True) for v in pinned))

    def _landing(self, count: int) -> tuple[Tensor, torch.cuda.Event] | None:
        """Where a CUDA device tells of so many pictures, and when it has."""
        if self.device.type != "cuda":
            return None
        return torch.empty(count, dtype=torch.bool, pin_memory=True), torch.cuda.Event()

    def lost(self) -> list[tuple[Picture, int]]:
        """Pictures that have left the finite numbers, with their attempt at that time; those of the last ticks may be told later."""
        found = []
        while self._flights:
            flight = self._flights[0]
            if flight.done is not None:
                if len(self._flights) <= _RUN_AHEAD and not flight.done.query():
                    break
                flight.done.synchronize()
            self._flights.popleft()
            found += [entry for entry, finite in zip(flight.pictures, flight.finite.tolist(), strict=True) if not finite]
        return found

    @torch.inference_mode()
    def decode(self, pictures: Sequence[Picture]) -> Decoding:
        """Begin to decode finished pictures, at most the largest of `decode_buckets`; their slots are free at once."""
        return self.decoder.start(self.state[self._tensor([p.slot for p in pictures]), 0])

    @torch.inference_mode()
    def preview(self, pictures: Sequence[Picture]) -> Decoding:
        """Begin to decode what the last step took pictures to become, at most the largest of `decode_buckets`; large ones at half size."""
        latents = self.clean[self._tensor([p.slot for p in pictures])]
        if self.checkpoint.config.image_size >= PREVIEW_HALVED_FROM and self.config.input_size % 2 == 0:
            latents = torch.nn.functional.avg_pool2d(latents, 2)
        return self.decoder.start(latents)

    # When something goes wrong.

    def halve(self) -> bool:
        """Half the rows from now on, after the device ran out of memory; False if there are no fewer."""
        if len(self.buckets) == 1 or self.max_rows <= FEWEST_ROWS:
            return False
        self.max_rows = max(FEWEST_ROWS, self.max_rows // 2)
        self.buckets = [b for b in self.buckets if b <= self.bucket(self.max_rows)]
        if self._captured:
            self._captured.clear()
            torch.cuda.empty_cache()
            try:
                self._capture()
            except torch.OutOfMemoryError:
                log.warning("no memory to capture graphs again; steps are launched kernel by kernel")
                self._captured.clear()
        torch.cuda.empty_cache()  # does nothing where there is no CUDA
        return True

    def healthy(self) -> bool:
        """Whether the device still answers: after some CUDA errors nothing does until the process ends."""
        try:
            return bool(torch.zeros(1, device=self.device).sum().item() == 0)
        except RuntimeError:
            log.exception("the device does not answer any more")
            return False

    def _tensor(self, values: Sequence[int]) -> Tensor:
        tensor = torch.tensor(values, dtype=torch.int64)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor
