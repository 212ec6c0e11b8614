"""What does not depend on x, computed once: the adaLN modulation of each (time, class) that runs, as rows of a table on the device.

A third of an adaLN-Zero network's weights make nothing but modulation. Pictures of one job share their times, and all share the null class,
so a row is made once, ahead of its step, many in one product, and gathered by every forward that needs it. Rows are made in batches of
one fixed shape, so that their bits do not depend on what else was missing.
"""

from collections import OrderedDict
from collections.abc import Iterable
from itertools import islice

import torch
from torch import Tensor

from model.dit import DiT

BATCH = 64  # pairs prepared together
_MOST_BYTES = 1 << 29

Pair = tuple[float, int]  # time, class


class PreparedTable:
    """Rows of `DiT.prepare`, the least recently used forgotten first."""

    def __init__(self, dit: DiT, needed: int, device: torch.device) -> None:
        """`needed`: pairs that one tick may need at once."""
        self.dit, self.device = dit, device
        dtype, width = dit.x_embedder.proj.weight.dtype, sum(dit.prepared_sizes)
        least = 2 * (needed + BATCH)
        rows = max(least, min(4096, _MOST_BYTES // (width * dtype.itemsize)))
        self.rows = torch.zeros(rows, width, dtype=dtype, device=device)
        self._row_of: OrderedDict[Pair, int] = OrderedDict()

    def find(self, pairs: list[Pair], ahead: Iterable[Pair]) -> list[int]:
        """The row of each pair. If any has to be made, pairs of `ahead`, which will be needed soon, fill up its batch."""
        known = self._row_of
        for pair in pairs:
            if pair in known:
                known.move_to_end(pair)  # not to be forgotten below
        missing = dict.fromkeys(pair for pair in pairs if pair not in known)
        if missing:
            soon = iter(ahead)
            while len(missing) % BATCH and (candidate := next(soon, None)) is not None:
                if candidate not in known:
                    missing[candidate] = None
            wanted = list(missing)
            for first in range(0, len(wanted), BATCH):
                self._make(wanted[first : first + BATCH])
        return [known[pair] for pair in pairs]

    def _make(self, pairs: list[Pair]) -> None:
        """Pairs count as known only once their rows are written: where memory runs out in between, nothing is lost or wrong."""
        padded = [*pairs, *[pairs[0]] * (BATCH - len(pairs))]
        t = torch.tensor([time for time, _ in padded], dtype=torch.float32)
        y = torch.tensor([label for _, label in padded], dtype=torch.int64)
        made = self.dit.prepare(*(self._moved(v) for v in (t, y)))[: len(pairs)]
        used = len(self._row_of)
        places = list(range(used, min(used + len(pairs), len(self.rows))))
        oldest = list(islice(self._row_of.items(), len(pairs) - len(places)))
        places += [row for _, row in oldest]
        self.rows.index_copy_(0, self._moved(torch.tensor(places, dtype=torch.int64)), made)
        for pair, _ in oldest:
            del self._row_of[pair]
        self._row_of.update(zip(pairs, places, strict=True))

    def _moved(self, values: Tensor) -> Tensor:
        return values.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else values
