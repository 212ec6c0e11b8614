"""Batches are made ahead of the device, in threads, and come out in the order in which they are asked for."""

import threading

import pytest
import torch

from training.batches import Batch, Prefetch, micro_batches, rows_of

CPU = torch.device("cpu")


def test_the_next_batches_are_made_while_one_is_used() -> None:
    made: dict[int, threading.Event] = {step: threading.Event() for step in range(10)}

    def make(step: int) -> Batch:
        made[step].set()
        return {"x": torch.full((2,), step)}

    with Prefetch(make, 10, CPU) as batches:
        assert batches.take(0)["x"].tolist() == [0, 0]
        assert all(made[step].wait(60) for step in (1, 2)) and not made[3].is_set()
        assert [int(batches.take(step)["x"][0]) for step in range(1, 10)] == list(range(1, 10))


def test_a_run_may_go_back_and_leave_steps_out() -> None:
    with Prefetch(lambda step: {"x": torch.full((1,), step)}, 10, CPU) as batches:
        assert [int(batches.take(step)["x"]) for step in (0, 1, 2, 7, 3, 4, 9)] == [0, 1, 2, 7, 3, 4, 9]


def test_what_goes_wrong_in_making_a_batch_is_raised_where_it_is_taken() -> None:
    def make(step: int) -> Batch:
        if step == 1:
            raise ValueError("picture 7 cannot be read")
        return {"x": torch.zeros(1)}

    with Prefetch(make, 3, CPU) as batches:
        batches.take(0)
        with pytest.raises(ValueError, match="picture 7 cannot be read"):
            batches.take(1)


@pytest.mark.parametrize(("size", "expected"), [(0, [5]), (2, [2, 2, 1]), (5, [5]), (9, [5])])
def test_micro_batches_are_all_rows_in_order(size: int, expected: list[int]) -> None:
    batch = {"x": torch.arange(5), "y": torch.arange(10).view(5, 2)}
    parts = list(micro_batches(batch, size))
    assert [rows_of(part) for part in parts] == expected
    assert all(torch.equal(torch.cat([part[name] for part in parts]), value) for name, value in batch.items())
