"""`dit …`: every command. Heavy imports happen inside the command that needs them."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from app.settings import Settings

app = typer.Typer(
    help="Class-conditional image generation with a Diffusion Transformer.", no_args_is_help=True, pretty_exceptions_enable=False
)
train = typer.Typer(help="Train the autoencoder, then the DiT on its latents.", no_args_is_help=True)
app.add_typer(train, name="train")

DataOption = Annotated[Path, typer.Option("--data", help="Folder of IDX files, or of one sub-folder of images per class.")]
CONFIGURATION_ERROR = 78  # see app.local: the supervisor does not start such a child again

ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on with the run saved in --out.")]


def fail(message: str, code: int = 1) -> NoReturn:
    """One clear line on stderr, and an exit code."""
    typer.echo(f"dit: {message}", err=True)
    raise typer.Exit(code)


def _train(run: Callable[[], Path]) -> None:
    from training.loop import Interrupted

    try:
        typer.echo(f"wrote {run()}")
    except Interrupted as stop:
        fail(str(stop), 130)
    except (ValueError, FloatingPointError, OSError) as error:
        fail(str(error))


@train.command("vae")
def train_vae_command(
    recipe: Annotated[str, typer.Argument(help="A bundled recipe's name, or a TOML file.")],
    data: DataOption,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; by default runs/RECIPE/vae.")] = None,
    resume: ResumeOption = False,
) -> None:
    """Stage one: images → latents and back."""

    def run() -> Path:
        from training.config import load_recipe
        from training.train_vae import train_vae

        loaded = load_recipe(recipe)
        return train_vae(loaded, data, out or Path("runs") / loaded.name / "vae", resume=resume)

    _train(run)


@train.command("dit")
def train_dit_command(
    recipe: Annotated[str, typer.Argument(help="A bundled recipe's name, or a TOML file.")],
    data: DataOption,
    vae: Annotated[Path | None, typer.Option(help="Folder of the trained VAE; by default runs/RECIPE/vae.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; by default runs/RECIPE/dit.")] = None,
    resume: ResumeOption = False,
) -> None:
    """Stage two: the DiT on cached latents; writes a checkpoint to OUT/checkpoint."""

    def run() -> Path:
        from training.config import load_recipe
        from training.train_dit import train_dit

        loaded = load_recipe(recipe)
        runs = Path("runs") / loaded.name
        return train_dit(loaded, data, vae or runs / "vae", out or runs / "dit", resume=resume)

    _train(run)


@app.command("evaluate")
def evaluate_command(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder, or a registry entry with versions.")],
    data: DataOption,
    samples: Annotated[int, typer.Option(help="Pictures to draw.")] = 10_000,
    steps: Annotated[int | None, typer.Option(help="Sampling steps; by default the checkpoint's.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="By default the checkpoint's.")] = None,
    sampler: Annotated[str | None, typer.Option(help="By default the checkpoint's.")] = None,
    save: Annotated[bool, typer.Option(help="Write metrics, grid and model card into the checkpoint.")] = True,
) -> None:
    """Class consistency and Fréchet distances, each beside its floor on real images."""
    from training.evaluate import evaluate

    try:
        evaluate(checkpoint, data, samples=samples, steps=steps, guidance_scale=guidance_scale, sampler=sampler, save=save, show=typer.echo)
    except (ValueError, OSError) as error:
        fail(str(error))


@app.command("cost")
def cost_command(
    models: Annotated[list[str] | None, typer.Argument(metavar="[MODEL]…", help="Presets (DiT-XL/2) or checkpoint folders.")] = None,
    image_size: Annotated[int, typer.Option(help="Pixels of a preset's pictures.")] = 256,
    block: Annotated[str, typer.Option(help="A preset's block: adaln-zero, adaln, cross-attention or in-context.")] = "adaln-zero",
    steps: Annotated[int, typer.Option(min=1, help="Guided evaluations of a whole picture.")] = 250,
    as_json: Annotated[bool, typer.Option("--json", help="A list of objects.")] = False,
) -> None:
    """Parameters and GMACs; without a model, the paper's: twelve presets, XL/2 at 512, and the other blocks."""
    import json
    from dataclasses import asdict

    from model.checkpoint import read_config
    from model.config import PRESETS
    from model.cost import Cost, cost, paper_costs, preset_cost, table

    def of(model: str) -> Cost:
        if model in PRESETS:
            return preset_cost(model, image_size=image_size, block=block, steps=steps)
        if not Path(model).exists():
            raise ValueError(f"{model!r} is neither a checkpoint folder nor one of: {', '.join(PRESETS)}")
        config, _ = read_config(model)
        return cost(model, config.architecture, config.vae, config.image_size, steps=steps)

    try:
        costs = [of(model) for model in models] if models else paper_costs(steps=steps)
    except (ValueError, OSError) as error:
        fail(str(error))
    typer.echo(json.dumps([asdict(c) for c in costs], indent=2) if as_json else "\n".join(table(costs)))


@app.command("up")
def up_command() -> None:
    """Run everything on this machine: embedded server, worker, API and page."""
    from app.local import StartError, up

    try:
        up(_settings())
    except StartError as error:
        fail(str(error))


@app.command("api")
def api_command() -> None:
    """Run the HTTP API alone, over the Redis of DIT_REDIS_URL."""
    import uvicorn

    from app.local import end_with_supervisor
    from app.main import create_app

    settings = _settings()
    _log_to_stderr()
    end_with_supervisor()
    try:
        application = create_app(settings)
    except ValueError as error:
        fail(str(error), CONFIGURATION_ERROR)
    uvicorn.run(application, host=settings.host, port=settings.port, log_level="warning", timeout_graceful_shutdown=3)


@app.command("worker")
def worker_command() -> None:
    """Run one worker over the Redis of DIT_REDIS_URL."""
    from app.local import end_with_supervisor

    settings = _settings()
    if settings.redis_url is None:
        fail("DIT_REDIS_URL must be set for a worker alone (`dit up` brings a server of its own)", CONFIGURATION_ERROR)
    _log_to_stderr()
    end_with_supervisor()
    # Before torch is imported, which reads it once: compiled graphs outlive the process, so that a second start is quick.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(settings.data.resolve() / "compiled"))
    from worker.serve import serve

    try:
        serve(
            redis_url=settings.redis_url,
            registry=settings.checkpoints,
            model=settings.model,
            device=settings.device,
            dtype=settings.dtype,
            max_rows=settings.max_rows,
            compile=settings.compile,
        )
    except ValueError as error:  # CheckpointError is one
        fail(str(error), CONFIGURATION_ERROR)


def _settings() -> "Settings":
    from app.settings import load_settings

    try:
        return load_settings()
    except ValueError as error:
        fail(str(error), CONFIGURATION_ERROR)


def _log_to_stderr() -> None:
    import logging

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")


def main() -> None:
    app()


if __name__ == "__main__":
    main()
