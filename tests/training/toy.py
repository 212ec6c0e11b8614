"""Tiny networks that learn something in milliseconds, trained by the real loop, in the test's process or in several (together.py)."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.func import functional_call

from training import state
from training.batches import Batch
from training.config import Execution, OptimiserConfig
from training.loop import fit
from training.randomness import sample_numbers, step_generator
from training.stage import Player, Stage
from training.world import joined


def config(steps: int = 12, **changes: Any) -> OptimiserConfig:
    values = {"batch_size": 4, "learning_rate": 0.05, "final_learning_rate": 0.001, "warmup_steps": 3, "sample_every": 5, "save_every": 100}
    return OptimiserConfig(steps=steps, **{**values, "precision": "float32", **changes})


class Run:
    """A regression whose every number comes from the sample's; it remembers its losses and does what it is told at a step."""

    def __init__(self, folder: Path, execution: Execution = Execution(tensorboard=False), **changes: Any) -> None:
        self.folder, self.execution, self.made_of = folder, execution, {"block": changes.pop("block", "adaln")}
        self.config = config(**changes)
        self.losses: dict[int, float] = {}
        self.at: dict[int, Callable[[], None]] = {}
        self.bad: Callable[[int], float] = lambda step: 0.0  # added to the loss of a step

    def batch_at(self, step: int, rows: slice) -> Batch:
        numbers = sample_numbers(step, self.config.batch_size, rows)
        return {"number": numbers, "x": torch.stack([torch.randn(3, generator=step_generator(0, int(n))) for n in numbers])}

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        step = int(batch["number"][0]) // self.config.batch_size
        if step in self.at:
            self.at.pop(step)()
        x = batch["x"]
        loss = (self.model(x) - x.sum(1, keepdim=True).sin()).square().mean() + self.bad(step)
        self.losses[step] = float(loss.detach())
        return {"loss": loss}

    def preview(self, model: nn.Module) -> Image.Image:
        return Image.new("L", (4, 4))

    def players(self) -> dict[str, Player]:
        self.model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
        return {"test": Player(self.model, self.config, parts=[self.model[0]])}

    def go(self, resume: bool = False, publish: float | None = None) -> dict[str, Tensor]:
        """The weights that come out; where they are spread over processes, whole in the first alone."""
        torch.manual_seed(0)
        stage = Stage("test", self.players(), self.batch_at, self.loss, self.preview, self.made_of)
        with joined() as world:
            averaged, seconds = fit(stage, self.folder, world=world, execution=self.execution, resume=resume, publish=publish)
        assert seconds > 0
        return averaged.state_dict()

    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "log.jsonl").read_text().splitlines()]

    def saved_step(self) -> int:
        newest = state.newest(self.folder)
        assert newest and state.facts(newest)["step"] == int(newest.name)
        return int(newest.name)


class Duel(Run):
    """Two networks: one draws numbers, the other tells them from those of a normal distribution around 3."""

    def players(self) -> dict[str, Player]:
        self.model, self.judge = nn.Linear(3, 1), nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 1))
        settings = config(learning_rate=0.02, steps=self.config.steps, ema_decay=())
        return {"artist": Player(self.model, self.config), "judge": Player(self.judge, settings, loss="judge")}

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        step = int(batch["number"][0]) // self.config.batch_size
        if step in self.at:
            self.at.pop(step)()
        drawn, real = self.model(batch["x"]), 3 + batch["x"][:, :1]
        weights = {name: value.detach() for name, value in self.judge.named_parameters()}
        fooled = nn.functional.softplus(-functional_call(self.judge, weights, drawn)).mean()
        told = nn.functional.softplus(self.judge(drawn.detach())).mean() + nn.functional.softplus(-self.judge(real)).mean()
        self.losses[step] = float(fooled.detach())
        return {"loss": fooled, "judge": told}
