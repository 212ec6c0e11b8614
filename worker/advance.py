"""One tick as one function of tensors: gather, forward, guidance, noise, sampler update, scatter. Compiled whole; captured on CUDA.

Shapes: R rows of the bucket; pictures are padded to R too, and those that are no picture live in the state's last slot. The numbers of a
tick are two matrices with a row each, WHOLE of int64 and REAL of float32, so that it costs two copies to the device.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from model.dit import DiT
from model.noise import normal
from model.sampling import guide, update
from worker.plan import K

# Per row: slot of the latent, 0 conditional or 1 null, row of the prepared table.
# Per picture: slot, conditional and other row, seed, evaluation of its noise.
WHOLE = ("row_slot", "row_half", "row_prepared", "slot", "conditional", "other", "seed", "evaluation")
REAL = (
    *(f"a{i}" for i in range(K * K)),
    *(f"b{i}" for i in range(K)),
    *("d", "low", "high", "clean_x", "clean_out", "scale", "channels", "rescale"),
)

Advance = Callable[[Tensor, Tensor], Tensor]  # whole (R, 8), real (R, …) → which pictures are finite (R,)


def make_advance(
    dit: DiT, state: Tensor, clean: Tensor, prepared: Tensor, *, compile: bool, changes: Tensor | None = None, reuse: bool = False
) -> Advance:
    """`state` (slots + 1, K, C, H, W) is advanced in place; what the network took the clean latents to be goes into `clean`
    (slots + 1, C, H, W); `prepared` is the table of `worker.prepared`.

    A picture that is not guided has its conditional row twice and scale 1, which guidance leaves as it is, bit for bit.
    With a block cache, `changes` (slots + 1, 2, tokens, D), what the middle blocks did is kept there, or with `reuse` taken from there.
    """

    def advance(state: Tensor, clean: Tensor, prepared: Tensor, changes: Tensor | None, whole: Tensor, real: Tensor) -> Tensor:
        row_slot, row_half, row_prepared, slot, conditional, other, seed, evaluation = whole.unbind(1)
        a, b, d, low, high, of_x, of_out, scale, channels, rescale = real.split([K * K, K, *[1] * 8], dim=1)
        per_row = (slice(None), slice(None), None, None)
        x, known = state[row_slot, 0], prepared[row_prepared]
        if changes is None:
            out = dit.denoise(x, known)
        elif reuse:
            out, _ = dit.denoise_cached(x, known, changes[row_slot, row_half])
        else:
            out, changes[row_slot, row_half] = dit.denoise_cached(x, known)
        out = guide(out[conditional], out[other], scale[per_row], channels[per_row], rescale[per_row])
        noise = normal(seed, evaluation, tuple(state.shape[2:]))
        new = update(state[slot], out, a.view(-1, K, K), b, d[:, 0], low[:, 0], high[:, 0], noise)
        clean[slot] = of_x[per_row] * state[slot, 0] + of_out[per_row] * out[:, : state.shape[2]]
        state[slot] = new
        return new.flatten(1).isfinite().all(1)

    run: Any = torch.compile(advance, dynamic=False) if compile else advance

    def call(whole: Tensor, real: Tensor) -> Tensor:
        if compile and whole.device.type == "cpu":  # one graph for all buckets there; on CUDA one for each
            torch._dynamo.mark_dynamic(whole, 0)
            torch._dynamo.mark_dynamic(real, 0)
        return run(state, clean, prepared, changes, whole, real)

    return call


class Captured:
    """`advance` for one bucket as a CUDA graph: one launch a tick. The numbers of a tick are copied to where the graph reads them."""

    def __init__(self, advance: Advance, bucket: int, device: torch.device, pool: Any, nobody: int) -> None:
        """`nobody`: the slot of no picture, on which it is tried."""
        self.whole = torch.zeros(bucket, len(WHOLE), dtype=torch.int64, device=device)
        for name in ("row_slot", "slot"):
            self.whole[:, WHOLE.index(name)] = nobody
        self.real = torch.zeros(bucket, len(REAL), device=device)
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(2):  # compiles, and lets libraries choose and allocate, which no capture may
                advance(self.whole, self.real)
        torch.cuda.current_stream(device).wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.finite = advance(self.whole, self.real)

    def __call__(self, whole: Tensor, real: Tensor) -> Tensor:
        """Host tensors, pinned."""
        self.whole.copy_(whole, non_blocking=True)
        self.real.copy_(real, non_blocking=True)
        self.graph.replay()
        return self.finite
