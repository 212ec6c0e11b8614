"""The loop that every stage shares: steps, log, previews, saves, and a resume that is the run that never stopped.

dit train dit RECIPE --data DIR
torchrun --nproc-per-node 8 --no-python dit train dit RECIPE --data DIR
"""

from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from training import state
from training.batches import Prefetch
from training.compiling import compiled
from training.config import Execution, OptimiserConfig
from training.learner import Learner, learning_rate
from training.pace import Pace
from training.runlog import RunLog
from training.stage import Stage
from training.stepper import Stepper
from training.stopping import Interrupted, stop_requests
from training.world import World

LOG_EVERY = 10
_AGREE_EVERY = 5  # steps after which many processes ask each other whether to stop
_ROLLBACKS = 3  # since the last save


def require_ready(
    config: OptimiserConfig, folder: Path, *, world: World, execution: Execution, resume: bool, publish: float | None = None
) -> Path | None:
    """What can be known to fail is asked here, before anything is done. Returns the state to go on from, None for a new run.

    ValueError if there is nothing to resume or something that would be overwritten, or if the processes cannot do what is asked.
    """
    if publish is not None and publish not in config.ema_decays:
        raise ValueError(f"there is no average of decay {publish}; ema_decay is {', '.join(map(str, config.ema_decays)) or 'empty'}")
    if execution.shard and world.size == 1:
        raise ValueError("one process has nobody to share its network with: start several with torchrun, or leave --shard out")
    world.share(config.batch_size)
    found = state.newest(folder)
    if found and not resume:
        raise ValueError(f"{folder} holds a run already: go on with --resume, or choose another --out")
    if resume and not found:
        raise ValueError(f"nothing to resume: {folder / state.STATE} holds no saved state")
    return found


def fit(
    stage: Stage, folder: Path, *, world: World, execution: Execution, resume: bool, publish: float | None = None
) -> tuple[nn.Module, float]:
    """Train the stage's networks in place. Returns the first with its first average, or that of decay `publish`, and the seconds spent.

    Raises Interrupted after saving, ValueError as `require_ready` does and where the run was started with other settings, and
    FloatingPointError if losses do not stay finite.
    """
    config = stage.main.config
    found = require_ready(config, folder, world=world, execution=execution, resume=resume, publish=publish)
    if found:
        _require_same_run(state.facts(found)["run"], stage.identity(), folder)
    with ExitStack() as stack:
        run = _Run(stage, folder, world, execution, stack)
        run.begin(found)
        run.train()
    average = publish if publish is not None else next(iter(config.ema_decays), None)
    return run.main.finished(average), run.seconds


def _require_same_run(started: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """A resumed run is the run that never stopped, so what shapes its steps may not change; how often it samples and saves may."""
    for name, value in now.items():
        if name.split(".")[-1] not in ("sample_every", "save_every") and started.get(name, value) != value:
            raise ValueError(f"{folder} was started with {name} = {started[name]}, the recipe now says {value}: choose another --out")


class _Run:
    """One start of a run. `position` counts the steps that are done."""

    def __init__(self, stage: Stage, folder: Path, world: World, execution: Execution, stack: ExitStack) -> None:
        self._stage, self._folder, self._world, self._execution = stage, folder, world, execution
        self._config = stage.main.config
        self._log = stack.enter_context(RunLog(folder, tensorboard=execution.tensorboard, quiet=not world.first))
        self._stop_asked = stack.enter_context(stop_requests())
        losses = compiled(stage, execution, world.device, self._log.say)
        self._learners = {name: Learner(player, world, shard=execution.shard) for name, player in stage.players.items()}
        self.main = next(iter(self._learners.values()))
        self._step = Stepper(self._learners, losses, world, execution)
        rows = world.share(self._config.batch_size)
        self._batches = stack.enter_context(Prefetch(lambda step: stage.batch_at(step, rows), self._config.steps, world.device))
        self._stack = stack
        self.position, self._seconds_before, self._rollbacks = 0, 0.0, 0

    @property
    def seconds(self) -> float:
        """Spent by all starts together."""
        return self._seconds_before + self._pace.seconds()

    def begin(self, found: Path | None) -> None:
        self._pace = Pace(self._config.batch_size)
        if found:
            state.read(found, self._tensors(), self._world)
            self.position, self._seconds_before = (state.facts(found)[name] for name in ("step", "seconds"))
        else:
            self._save()  # also to learn now, and not after an hour, whether the folder takes it
        bar = tqdm(
            total=self._config.steps,
            initial=self.position,
            desc=self._stage.title,
            unit="step",
            dynamic_ncols=True,
            disable=not self._world.first,
        )
        self._bar = self._stack.enter_context(bar)
        self._log.start(
            stage=self._stage.title,
            steps=self._config.steps,
            batch_size=self._config.batch_size,
            parameters=sum(p.numel() for p in self._stage.main.network.parameters()),
            processes=self._world.size,
            resumed_at=self.position,
            optimiser=asdict(self._config),
            execution=asdict(self._execution),
        )

    def train(self) -> None:
        while self.position < self._config.steps:
            self._step(self.position, self._batches.take(self.position))
            self._pace.step()
            self.position += 1
            stopping = self._stopping()
            if stopping or any(self._every(n) for n in (LOG_EVERY, self._config.sample_every, self._config.save_every)):
                self._settle(stopping)
            self._bar.update(self.position - self._bar.n)
        self._log.write(event="end", step=self._config.steps, seconds=round(self.seconds, 1))

    def _every(self, steps: int) -> bool:
        return self.position % steps == 0 or self.position == self._config.steps

    def _stopping(self) -> bool:
        """Whether Ctrl-C or SIGTERM asked for it; many processes answer alike, and only at some steps."""
        if self._world.size == 1:
            return self._stop_asked()
        return self._every(_AGREE_EVERY) and self._world.any(self._stop_asked())

    def _settle(self, stopping: bool) -> None:
        """What waits for the device, and is not done at every step."""
        bad = self._step.guard.bad_step()
        if bad is not None:
            self._roll_back(bad)
        elif self._every(LOG_EVERY):
            self._write()
        if self._every(self._config.sample_every):
            self._preview()
        if stopping or self._every(self._config.save_every):
            self._save()
            self._rollbacks = 0 if bad is None else self._rollbacks  # weights that no step has tried since are not yet known to be good
        if stopping and self.position < self._config.steps:
            self._log.write(event="interrupted", step=self.position)
            raise Interrupted(f"saved at step {self.position} of {self._config.steps} in {self._folder}; go on with --resume")

    def _write(self) -> None:
        values = self._step.values()
        told = self._pace.read(self._config.steps - self.position, self._batches.waited_s)
        self._bar.set_postfix(loss=f"{values['loss']:.4f}", images_per_s=f"{told['images_per_s']:.1f}", refresh=False)
        self._log.step(self.position, {**values, "learning_rate": learning_rate(self._config, self.position - 1), **told})

    def _preview(self) -> None:
        """Where the network is spread all processes must draw, else the first alone."""
        if not (self._world.first or self._execution.shard):
            return
        uncompiled = torch.compiler.set_stance("force_eager") if self._execution.compile else nullcontext()
        with self._pace.paused(), uncompiled, self.main.shown() as network:
            self._log.picture(self.position, self._stage.preview(network))

    def _tensors(self) -> dict[str, Tensor]:
        return {f"{name}.{key}": value for name, learner in self._learners.items() for key, value in learner.tensors().items()}

    def _save(self) -> None:
        with self._pace.paused():
            facts = {"run": self._stage.identity(), "step": self.position, "seconds": self.seconds}
            state.write(self._folder, self._tensors(), facts, self._world)

    def _roll_back(self, bad: int) -> None:
        """Step `bad` gave no finite numbers. Its update was not made, and training goes on behind it; where that cannot do or did not,
        with the last saved weights."""
        reason, saved = self._step.guard.told(), state.newest(self._folder)
        assert saved is not None
        self._rollbacks += 1
        if self._rollbacks > _ROLLBACKS:
            raise FloatingPointError(
                f"{reason} at step {bad + 1}, after {_ROLLBACKS} rollbacks; the last saved state is {saved}. "
                "Lower learning_rate, try qk_norm, or precision = 'float32'"
            )
        kept = bad
        if self._rollbacks > 1 or self._world.any(not all(learner.is_finite() for learner in self._learners.values())):
            state.read(saved, self._tensors(), self._world)
            kept = int(saved.name)
        self._step.guard.reset()
        self.position = bad + 1
        self._log.write(event="rollback", step=bad + 1, to=kept, reason=reason)
        self._log.say(f"{reason} at step {bad + 1}: that step is left out, and training goes on with the weights of step {kept}")


def grid(images: Tensor, columns: int, scale: int = 2) -> Image.Image:
    """uint8 images (B, H, W, C) → one picture, row by row, enlarged without blur."""
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    canvas = torch.zeros(rows * height, columns * width, channels, dtype=torch.uint8)
    for i in range(count):
        top, left = i // columns * height, i % columns * width
        canvas[top : top + height, left : left + width] = images[i]
    picture = Image.fromarray((canvas[..., 0] if channels == 1 else canvas).numpy())
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
