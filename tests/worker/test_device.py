"""What a device can do: which one, in which type, how many rows pay, and where a row has the same bits."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from model.checkpoint import Checkpoint
from worker import device as device_module
from worker.device import (
    affordable,
    alike_buckets,
    can_compile,
    choose_device,
    choose_dtype,
    elapsed,
    row_buckets,
    steady_threads,
    worthwhile,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


# --- device and type ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("there", "expected"), [(True, "cuda"), (False, "cpu")])
def test_the_device_is_cuda_where_there_is_one(monkeypatch: pytest.MonkeyPatch, there: bool, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert choose_device("auto") == torch.device(expected)
    assert choose_device("cpu") == CPU


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("meta", "DIT_DEVICE=meta: must be auto, cpu, cuda or one of several, as cuda:1"),
        ("gpu", "must be auto, cpu, cuda"),
        ("", "must be auto, cpu, cuda"),
        ("cuda:x", "DIT_DEVICE=cuda:x: "),
        pytest.param("cuda", "DIT_DEVICE=cuda: ", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")),
        pytest.param("cuda:99", "DIT_DEVICE=cuda:99: ", id="one too many"),
    ],
)
def test_a_device_that_is_not_there_is_a_value_error_of_one_line(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as told:
        choose_device(name)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_the_type_is_bfloat16_where_the_processor_has_it(monkeypatch: pytest.MonkeyPatch, native: bool, expected: torch.dtype) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: native)
    assert choose_dtype("auto", CPU) == choose_dtype("auto", CUDA) == expected
    assert choose_dtype("float32", CPU) == torch.float32 and choose_dtype("float16", CPU) == torch.float16


def test_a_type_that_there_is_not_is_a_value_error_that_lists_those_there_are() -> None:
    with pytest.raises(ValueError, match="DIT_DTYPE=int8: must be auto or one of float32, bfloat16, float16"):
        choose_dtype("int8", CPU)


def test_the_cpu_compiles_only_with_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    assert can_compile(CUDA)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    assert not can_compile(CPU)
    monkeypatch.setenv("CXX", "/bin/sh")
    assert can_compile(CPU)


# --- how many rows pay -------------------------------------------------------------------------------------------------


class Device:
    """Times of forwards and decodes, as a function of their size, in place of a clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoint, forward: Callable[[int], float]) -> None:
        self.checkpoint, self.forward, self.sizes = checkpoint, forward, list[int]()
        monkeypatch.setattr(checkpoint.dit, "forward", lambda x, t, y: self._run(len(x)))
        monkeypatch.setattr(checkpoint.vae, "decode", lambda z: self._run(len(z)))
        monkeypatch.setattr(device_module, "elapsed", lambda run, device: run())

    def _run(self, size: int) -> float:
        self.sizes.append(size)
        return self.forward(size)

    def affordable(self, most_rows: int = 64, limit_s: float = 2.0) -> tuple[int, int, dict[int, float]]:
        return affordable(self.checkpoint, most_rows, limit_s)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, build_checkpoint: Callable[..., Checkpoint]) -> Callable[..., Device]:
    return lambda forward: Device(monkeypatch, build_checkpoint(), forward)


def test_rows_double_to_the_most_while_twice_as_many_bring_more(device: Callable[..., Device]) -> None:
    rows, images, curve = device(lambda size: 0.01 + 0.001 * size).affordable()
    assert (rows, images) == (64, 16)
    assert curve == {size: pytest.approx(0.01 + 0.001 * size) for size in (4, 8, 16, 32, 64)}


def test_rows_stop_where_twice_as_many_bring_no_more(device: Callable[..., Device]) -> None:
    rows, images, _ = device(lambda size: 0.1 if size <= 16 else 0.1 * size / 16).affordable()
    assert (rows, images) == (16, 16)


def test_one_size_that_another_process_disturbed_once_does_not_end_the_curve(device: Callable[..., Device]) -> None:
    tried = device(lambda size: 0.9 if size == 8 and tried.sizes.count(8) <= 2 else 0.01 + 0.0001 * size)
    assert tried.affordable()[0] == 64


def test_worthwhile_is_the_smallest_size_that_does_nearly_as_many_a_second_as_the_best() -> None:
    assert worthwhile({4: 1.0, 8: 1.0, 16: 2.0, 32: 4.0}) == 8
    assert worthwhile({4: 1.0, 8: 1.2, 16: 2.6, 32: 3.2}) == 32, "a step that does not pay may lead to one that does"
    assert worthwhile({2: 5.0}) == 2


def test_rows_stop_before_a_tick_takes_too_long(device: Callable[..., Device]) -> None:
    tried = device(lambda size: 0.3 + 0.05 * size)
    rows, images, curve = tried.affordable(most_rows=256, limit_s=2.0)
    assert rows == 32 and curve[32] == pytest.approx(1.9) and images == 16
    assert max(tried.sizes) == 64, "what would take longer still is not tried"


def test_the_smallest_batches_are_taken_however_long_they_take(device: Callable[..., Device]) -> None:
    tried = device(lambda size: 100.0)
    assert tried.affordable() == (4, 2, {4: 100.0})
    assert set(tried.sizes) == {4, 2}


def test_rows_stop_where_memory_runs_out(device: Callable[..., Device]) -> None:
    def forward(size: int) -> float:
        if size > 8:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return 0.1

    assert device(forward).affordable()[:2] == (8, 8)


def test_a_model_of_which_not_even_the_smallest_batch_fits_is_out_of_memory(device: Callable[..., Device]) -> None:
    def forward(size: int) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        device(forward).affordable()


@pytest.mark.parametrize("most", [2, 4, 5, 8, 9])
def test_the_most_rows_that_were_asked_for_are_a_bound(device: Callable[..., Device], most: int) -> None:
    assert device(lambda size: 0.01).affordable(most_rows=most)[0] == (4 if most < 8 else 8)


def test_a_real_model_is_measured(build_checkpoint: Callable[..., Checkpoint]) -> None:
    rows, images, curve = affordable(build_checkpoint(), 8, 1e6)
    assert rows in (4, 8) and images in (2, 4, 8, 16) and all(seconds > 0 for seconds in curve.values())
    assert affordable(build_checkpoint(), 32, 0.0)[:2] == (4, 2)


def test_elapsed_is_the_time_of_one_call() -> None:
    calls: list[int] = []
    assert elapsed(lambda: calls.append(1), CPU) >= 0 and calls == [1]


# --- the same bits everywhere ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("max_rows", "device", "buckets"),
    [
        (1, "cpu", [2]),
        (2, "cpu", [2]),
        (4, "cpu", [2, 3, 4]),
        (5, "cpu", [2, 3, 4, 6]),
        (8, "cpu", [2, 3, 4, 6, 8]),
        (10, "cpu", [2, 3, 4, 6, 8, 12]),
        (16, "cpu", [2, 3, 4, 6, 8, 12, 16]),
        (2, "cuda", [2]),
        (5, "cuda", [2, 4, 8]),
        (32, "cuda", [2, 4, 8, 16, 32]),
    ],
)
def test_buckets_grow_until_one_holds_the_most_rows(max_rows: int, device: str, buckets: list[int]) -> None:
    assert row_buckets(max_rows, torch.device(device)) == buckets


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
