"""What a worker tells of its models, and what it reads of its machine."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from model.checkpoint import load
from worker.load import Loader
from worker.protocol import ModelRecord
from worker.serve import describe, free_bytes, serve, trace_to

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("objective", "samplers", "spacings"),
    [
        ("flow", ["euler", "heun", "ab2"], {}),
        (
            "diffusion",
            ["ddpm", "ddpm-small", "ddpm-large", "ddim", "dpm-solver++", "sde-dpm-solver++"],
            {"ddim": "paper", "dpm-solver++": "log-snr"},
        ),
    ],
)
def test_a_record_says_what_the_model_can_do_and_whether_it_is_resident(
    tmp_path: Path, make_checkpoint: Callable[..., Path], objective: str, samplers: list[str], spacings: dict[str, str]
) -> None:
    folder = make_checkpoint(tmp_path, objective)
    checkpoint, loader = load(folder), Loader(CPU, torch.bfloat16, max_rows=4, compile=False)
    record = describe("tiny", checkpoint.config, checkpoint.hash, None, loader)
    assert (record.id, record.checkpoint, record.objective, record.samplers) == ("tiny", checkpoint.hash, objective, samplers)
    assert (record.image_size, record.image_channels, record.labels[0]) == (16, 1, ["cat", "house cat"])
    assert (record.device, record.dtype, record.max_rows, record.max_steps) == ("cpu", "bfloat16", 0, 1000)
    assert spacings.items() <= record.default_spacings.items() and bool(record.spacings) == (objective == "diffusion")
    assert record.defaults["steps"] == 4
    assert ModelRecord.parse(record.dump()) == record, "it travels through Redis"
    assert describe("tiny", checkpoint.config, checkpoint.hash, loader(folder), loader).max_rows == 4


def test_free_memory_is_told_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 << 26 < free_bytes(CPU) < 1 << 45

    def no_linux(self: Path) -> str:
        raise FileNotFoundError(self)

    monkeypatch.setattr(Path, "read_text", no_linux)
    assert free_bytes(CPU) == 8 << 30


def test_a_trace_is_one_json_line_a_tick_that_can_be_read_while_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    with path.open("w") as file:
        write = trace_to(file)
        for tick in range(3):
            write({"t": tick, "steps": [("a", 0, tick)]})
            assert [json.loads(line)["t"] for line in path.read_text().splitlines()] == list(range(tick + 1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"device": "tpu"}, "DIT_DEVICE=tpu"), ({"dtype": "int4"}, "DIT_DTYPE=int4"), ({}, "no model in .*, which has: none")],
)
def test_what_cannot_be_served_is_refused_before_redis_is_asked(tmp_path: Path, settings: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        serve(redis_url="unix:///nowhere.sock", registry=tmp_path, models=None, drain_s=1, **settings)
