"""What a device can do: how it is chosen, how many rows pay, and with which threads and batches a row has the same bits everywhere."""

import os
import shutil
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from model.checkpoint import DTYPES, Checkpoint
from worker.decoder import DECODE_BUCKETS, SMALLEST_DECODE

SMALLEST_BUCKET = 2  # a row by itself has other bits on the CPU
FEWEST_ROWS = 4  # to be the most of a forward: two guided pictures, so that none has to wait for another to end
_NEARLY = 0.95  # of the most rows a second that any number of rows gives
_ROUNDS = 5


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one. ValueError for a device that is not there, or of another kind."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"DIT_DEVICE={name}: must be auto, cpu, cuda or one of several, as cuda:1")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"DIT_DEVICE={name}: {str(error).splitlines()[0]}") from error
    return device


def use_device(device: torch.device) -> None:
    """Make it this thread's CUDA device: graphs and events belong to the current one, whatever tensors they are about."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def is_out_of_memory(error: Exception) -> bool:
    """Of the device, or of a system that refuses to give any."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the processor has it, else float32."""
    if name == "auto":
        native = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if native else torch.float32
    if name not in DTYPES:
        raise ValueError(f"DIT_DTYPE={name}: must be auto or one of {', '.join(DTYPES)}")
    return DTYPES[name]


def row_buckets(max_rows: int, device: torch.device) -> list[int]:
    """Powers of two from the smallest bucket to the first that holds max_rows; on the CPU, where a bucket costs neither a graph
    nor its memory, also what is half-way between two.
    """
    powers = [SMALLEST_BUCKET << i for i in range(max_rows.bit_length())]
    sizes = sorted({*powers, *(3 * power // 2 for power in powers if device.type == "cpu")})
    return [size for size, smaller in zip(sizes, [0, *sizes], strict=False) if smaller < max_rows]


def alike_buckets(run: Callable[[Tensor], Tensor], buckets: Sequence[int]) -> list[int]:
    """The buckets in which every row comes out bit for bit as in the largest, wherever it stands; none, if in the largest it matters where.

    `run` takes the indices of rows (bucket,) and gives one output each. Where kernels change from one place to the next, a row moved
    on by one shows it; more moves make it surer.
    """
    order = torch.arange(max(buckets))
    reference = run(order)

    def alike(bucket: int) -> bool:
        return all(torch.equal(run(rows), reference[rows]) for rows in (order.roll(shift)[:bucket] for shift in (0, 1, 2, 5)))

    steady = [bucket for bucket in buckets if alike(bucket)]
    return steady if max(buckets) in steady else []


def steady_threads(threads: int, is_steady: Callable[[int], bool]) -> int:
    """The most threads, or else the next lower powers of two, with which a row's bits do not depend on its place; 1 always does.

    The CPU's kernels share rows out among threads, and a thread that gets few of them takes another path: with float32 products over
    3, 5, 6, 7 or 12 threads rows had other bits in other places, over 1, 2, 4, 8, 16 and 32 none.
    """
    while threads > 1 and not is_steady(threads):
        threads = 1 << ((threads - 1).bit_length() - 1)
    return threads


def can_compile(device: torch.device) -> bool:
    """torch.compile needs a C++ compiler on the CPU; CUDA brings its own (Triton)."""
    return device.type == "cuda" or shutil.which(os.environ.get("CXX", "g++")) is not None or shutil.which("clang++") is not None


def elapsed(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, to the end of what it queued on the device."""
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


@torch.inference_mode()
def affordable(checkpoint: Checkpoint, most_rows: int, limit_s: float) -> tuple[int, int, dict[int, float]]:
    """Rows of a forward, images of a decode, and the curve that was measured: rows → seconds of an (uncompiled) forward.

    Both are powers of two from the smallest batch, and no more than fit the device's memory and take `limit_s` (a tick is how long a new
    job waits), nor more than bring more rows a second.
    """
    assert checkpoint.vae is not None
    c, device, vae = checkpoint.config.architecture, checkpoint.device, checkpoint.vae

    def forward(rows: int) -> Callable[[], Any]:
        x = torch.randn(rows, c.in_channels, c.input_size, c.input_size, device=device)
        t, y = torch.zeros(rows, device=device), torch.zeros(rows, dtype=torch.int64, device=device)
        return lambda: checkpoint.dit(x, t, y)

    def decode(images: int) -> Callable[[], Any]:
        z = torch.randn(images, c.in_channels, c.input_size, c.input_size, device=device)
        return lambda: vae.decode(z)

    curve = _curve(forward, FEWEST_ROWS, most_rows, device, limit_s)
    return worthwhile(curve), worthwhile(_curve(decode, SMALLEST_DECODE, DECODE_BUCKETS[-1], device, limit_s)), curve


def worthwhile(curve: dict[int, float]) -> int:
    """The smallest size that does nearly as many a second as the best one."""
    best = max(size / seconds for size, seconds in curve.items())
    return min(size for size, seconds in curve.items() if size / seconds >= _NEARLY * best)


def _curve(make: Callable[[int], Callable[[], Any]], smallest: int, most: int, device: torch.device, limit_s: float) -> dict[int, float]:
    """Size → seconds: the best of a few rounds over all sizes that fit, so that another process's moment disturbs none of them."""
    curve: dict[int, float] = {}
    for measured in range(_ROUNDS):
        size = smallest
        while size <= max(smallest, most) and (not measured or size in curve):
            try:
                run = make(size)
                run()  # the first call prepares kernels
                seconds = elapsed(run, device)
            except torch.OutOfMemoryError:
                if size == smallest:
                    raise
                return {known: value for known, value in curve.items() if known < size}
            if size == smallest or seconds <= limit_s:
                curve[size] = min(seconds, curve.get(size, seconds))
            if seconds > limit_s:
                break
            size *= 2
        if sum(curve.values()) > limit_s:
            break
    return curve
