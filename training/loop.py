"""The loop that both stages share: step, clip, EMA, log, samples, save, resume, Ctrl-C."""

import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from training.config import OptimiserConfig
from training.ema import EMA
from training.runlog import RunLog

LOG_EVERY = 10
STATE = "state.pt"


class Interrupted(Exception):
    """Ctrl-C or SIGTERM: the state was saved, the run can go on with --resume."""


def learning_rate(config: OptimiserConfig, step: int) -> float:
    """Linear warm-up, then a cosine from `learning_rate` to `final_learning_rate`."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.final_learning_rate + (config.learning_rate - config.final_learning_rate) * (1 + math.cos(math.pi * done)) / 2


def step_generator(seed: int, step: int) -> torch.Generator:
    """Every random number of a step comes from this, so a resumed run draws what the run never stopped would have drawn."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Turns the first SIGINT or SIGTERM into a flag that is read between steps; a second one ends the process at once."""
    asked: list[int] = []

    def ask(number: int, _: FrameType | None) -> None:
        asked.append(number)
        signal.signal(number, signal.SIG_DFL)

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _save_state(
    path: Path, model: nn.Module, ema: EMA, optimiser: torch.optim.Optimizer, config: dict[str, Any], step: int, seconds: float
) -> None:
    state = {
        "config": config,
        "model": model.state_dict(),
        "ema": ema.model.state_dict(),
        "optimiser": optimiser.state_dict(),
        "step": step,
        "seconds": seconds,
    }
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the rename itself
    finally:
        os.close(descriptor)


def _same_run(started: dict[str, Any], config: dict[str, Any], folder: Path) -> None:
    """A resumed run is the run that never stopped, so what shapes its steps may not change; how often it samples and saves may."""
    for name, now in config.items():
        if name not in ("sample_every", "save_every") and started.get(name, now) != now:
            raise ValueError(f"{folder} was started with {name} = {started[name]}, the recipe now says {now}: choose another --out")


def fit(
    model: nn.Module,
    loss_at: Callable[[int], dict[str, Tensor]],
    config: OptimiserConfig,
    folder: Path,
    *,
    preview: Callable[[nn.Module], Image.Image],
    resume: bool,
    title: str,
    made_of: dict[str, Any],
) -> tuple[nn.Module, float]:
    """Train `model` in place; `loss_at(step)` gives scalars, of which `loss` is minimised. Returns the EMA model and the seconds spent.

    `made_of` names what else must be the same for a run to be resumed: architecture and objective.

    Raises Interrupted after saving, ValueError if there is nothing to resume or something that would be overwritten.
    """
    state_path, run = folder / STATE, {**asdict(config), **made_of}
    if state_path.exists() and not resume:
        raise ValueError(f"{folder} holds a run already: go on with --resume, or choose another --out")
    if resume and not state_path.exists():
        raise ValueError(f"nothing to resume: {state_path} does not exist")
    ema = EMA(model, config.ema_decay)
    optimiser = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay)
    start, seconds_before = 0, 0.0
    if resume:
        state = torch.load(state_path, map_location="cpu", weights_only=True)
        _same_run(state.get("config", {}), run, folder)
        model.load_state_dict(state["model"])
        ema.model.load_state_dict(state["ema"])
        optimiser.load_state_dict(state["optimiser"])
        start, seconds_before = state["step"], state["seconds"]

    began = since = time.perf_counter()
    logged = start
    with (
        RunLog(folder) as log,
        stop_requests() as stop_asked,
        tqdm(total=config.steps, initial=start, desc=title, unit="step", dynamic_ncols=True) as bar,
    ):
        log.start(stage=title, optimiser=asdict(config), resumed_at=start, parameters=sum(p.numel() for p in model.parameters()))
        for step in range(start, config.steps):
            rate = learning_rate(config, step)
            for group in optimiser.param_groups:
                group["lr"] = rate
            losses = loss_at(step)
            losses["loss"].backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            ema.update(model, step)
            bar.update()

            done = step + 1
            stopping, last = stop_asked(), done == config.steps
            logging, saving = done % LOG_EVERY == 0 or last, done % config.save_every == 0 or last or stopping
            if logging or saving:  # reading a loss waits for the device, so it is not done at every step
                values = {name: float(value.detach()) for name, value in losses.items()} | {"gradient_norm": float(norm)}
                wrong = next((name for name in ("loss", "gradient_norm") if not math.isfinite(values[name])), None)
                if wrong:
                    raise FloatingPointError(f"the {wrong} became {values[wrong]} at step {done}; the last saved state is {state_path}")
            if logging:
                now = time.perf_counter()
                speed = config.batch_size * (done - logged) / (now - since)
                since, logged = now, done
                bar.set_postfix(loss=f"{values['loss']:.4f}", images_per_s=f"{speed:.0f}", refresh=False)
                log.write(step=done, **values, learning_rate=rate, images_per_s=round(speed, 1))
            if done % config.sample_every == 0 or last:
                preview(ema.model).save(folder / f"samples-{done:06d}.png")
            if saving:
                _save_state(state_path, model, ema, optimiser, run, done, seconds_before + time.perf_counter() - began)
            if stopping and not last:
                log.write(event="interrupted", step=done)
                raise Interrupted(f"saved at step {done} of {config.steps} in {folder}; go on with --resume")
        seconds = seconds_before + time.perf_counter() - began
        log.write(event="end", step=config.steps, seconds=round(seconds, 1))
    return ema.model, seconds


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
