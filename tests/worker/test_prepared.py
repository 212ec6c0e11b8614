"""The table of prepared rows: each is what `DiT.prepare` makes, made once, and there when a tick needs it."""

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.checkpoint import Checkpoint
from model.config import BLOCKS
from model.dit import DiT
from worker.prepared import BATCH, Pair, PreparedTable

BuildCheckpoint = Callable[..., Checkpoint]
Prepared = list[list[Pair]]  # the pairs of every batch, with its padding

PAIRS = [(time / 64, label) for time in range(64) for label in range(5)]


class Counting(PreparedTable):
    """Remembers which pairs were prepared, batch by batch; with a size of its own."""

    def __init__(self, dit: DiT, needed: int, rows: int | None = None) -> None:
        super().__init__(dit, needed, torch.device("cpu"))
        if rows is not None:
            self.rows = self.rows[:rows]
        self.batches: Prepared = []
        prepare = dit.prepare

        def counted(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            self.batches.append(list(zip(t.tolist(), y.tolist(), strict=True)))
            return prepare(t, y)

        dit.prepare = counted  # type: ignore[method-assign]


def expected(dit: DiT, pairs: list[Pair]) -> torch.Tensor:
    """By the network itself, padded to the table's batch: a kernel's bits depend on the number of rows."""
    padded = [*pairs, *[pairs[0]] * (-len(pairs) % BATCH)]
    t, y = torch.tensor([time for time, _ in padded]), torch.tensor([label for _, label in padded])
    parts = [type(dit).prepare(dit, *part) for part in zip(t.split(BATCH), y.split(BATCH), strict=True)]
    return torch.cat(parts)[: len(pairs)]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("block", BLOCKS)
def test_a_row_is_bit_for_bit_what_the_network_prepares_whatever_was_asked_before(
    build_checkpoint: BuildCheckpoint, block: str, dtype: torch.dtype, threads: int
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        dit = build_checkpoint(block=block).dit.to(dtype)
        table = PreparedTable(dit, 8, torch.device("cpu"))
        found: dict[Pair, torch.Tensor] = {}
        with torch.inference_mode():
            for first in range(0, 200, 7):
                pairs = PAIRS[first : first + 8]
                for pair, row in zip(pairs, table.find(pairs, PAIRS[first + 90 : first + 120]), strict=True):
                    found.setdefault(pair, table.rows[row].clone())
                    assert torch.equal(table.rows[row], found[pair]), "it has not changed since"
            assert torch.equal(torch.stack(list(found.values())), expected(dit, list(found)))
    finally:
        torch.set_num_threads(before)


def test_a_pair_that_is_known_is_not_made_again(build_checkpoint: BuildCheckpoint) -> None:
    table = Counting(build_checkpoint().dit, 8)
    rows = table.find(PAIRS[:8], ())
    assert table.find(PAIRS[:8][::-1], PAIRS[100:]) == rows[::-1] and len(table.batches) == 1
    assert table.find([PAIRS[3]] * 5, ()) == [rows[3]] * 5


def test_pairs_that_are_needed_soon_fill_the_batch_and_each_once(build_checkpoint: BuildCheckpoint) -> None:
    table = Counting(build_checkpoint().dit, 8)
    table.find([PAIRS[0]], ())
    soon = itertools.chain([PAIRS[0]], PAIRS[:20], PAIRS[:300])
    table.find(PAIRS[5:10], soon)
    assert table.batches[1] == [*PAIRS[5:10], *PAIRS[1:5], *PAIRS[10:65]], "what is known, or asked for already, is left out"
    assert next(soon) == PAIRS[65], "no more than fill the batch are looked at"
    table.find(PAIRS[30:38], PAIRS)
    assert len(table.batches) == 2


def test_more_pairs_than_a_batch_are_made_in_several_of_one_shape(build_checkpoint: BuildCheckpoint) -> None:
    table = Counting(build_checkpoint().dit, 200)
    rows = table.find(PAIRS[:200], ())
    assert [len(batch) for batch in table.batches] == [BATCH] * 4 and len(set(rows)) == 200


def test_a_batch_that_runs_out_of_memory_changes_nothing(build_checkpoint: BuildCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where older rows would have been given up for it."""
    dit = build_checkpoint().dit
    table = Counting(dit, 8, rows=2 * BATCH)
    for pairs in (PAIRS[:BATCH], PAIRS[BATCH : 2 * BATCH]):
        table.find(pairs, ())
    before, rows = dict(table._row_of), table.rows.clone()
    moved, calls = table._moved, itertools.count(1)

    def failing(values: torch.Tensor) -> torch.Tensor:
        if next(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return moved(values)

    monkeypatch.setattr(table, "_moved", failing)
    with pytest.raises(torch.OutOfMemoryError):
        table.find(PAIRS[200:208], ())
    assert table._row_of == before and torch.equal(table.rows, rows)
    found = table.find(PAIRS[200:208], ())
    assert torch.equal(table.rows[found], expected(dit, PAIRS[200:208]))


def test_a_large_network_has_a_table_that_holds_two_ticks(build_checkpoint: BuildCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    dit = build_checkpoint().dit
    assert len(PreparedTable(dit, 16, torch.device("cpu")).rows) == 4096
    monkeypatch.setattr("worker.prepared._MOST_BYTES", 1)
    assert len(PreparedTable(dit, 16, torch.device("cpu")).rows) == 2 * (16 + BATCH)


@settings(database=None, deadline=None, derandomize=True, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    asked=st.lists(
        st.tuples(st.lists(st.sampled_from(PAIRS), min_size=1, max_size=8), st.integers(0, 250), st.integers(0, 70)),
        min_size=1,
        max_size=30,
    )
)
def test_what_a_tick_needs_is_never_forgotten_for_what_comes_later(
    build_checkpoint: BuildCheckpoint, asked: list[tuple[list[Pair], int, int]]
) -> None:
    """The smallest table that there may be, which gives up rows at nearly every batch."""
    dit = build_checkpoint().dit
    table = Counting(dit, 8, rows=2 * (8 + BATCH))
    truth = dict(zip(PAIRS, expected(dit, PAIRS), strict=True))
    for pairs, first, ahead in asked:
        rows = table.find(pairs, PAIRS[first : first + ahead])
        assert all(torch.equal(table.rows[row], truth[pair]) for pair, row in zip(pairs, rows, strict=True))
        used = list(table._row_of.values())
        assert len(set(used)) == len(used) <= len(table.rows), "no row is given to two"


def test_the_pairs_used_last_are_kept(build_checkpoint: BuildCheckpoint) -> None:
    table = Counting(build_checkpoint().dit, 8, rows=2 * (8 + BATCH))
    kept = PAIRS[:8]
    for first in range(8, 300, BATCH):
        table.find(kept, ())
        table.find(PAIRS[first : first + BATCH], ())
    made = [pair for batch in table.batches for pair in dict.fromkeys(batch)]
    assert all(made.count(pair) == 1 for pair in kept)
