"""`dit …`: every command. Heavy imports happen inside the command that needs them."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

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
    image_size: Annotated[int | None, typer.Option(help="Pixels of a preset's pictures; by default 256.")] = None,
    block: Annotated[
        str | None, typer.Option(help="A preset's block: adaln-zero (the default), adaln, cross-attention or in-context.")
    ] = None,
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
            return preset_cost(model, image_size=256 if image_size is None else image_size, block=block or "adaln-zero", steps=steps)
        if not Path(model).exists():
            raise ValueError(f"{model!r} is neither a checkpoint folder nor one of: {', '.join(PRESETS)}")
        config, _ = read_config(model)
        return cost(model, config.architecture, config.vae, config.image_size, steps=steps)

    chosen = [name for name, value in (("--image-size", image_size), ("--block", block)) if value is not None]
    if chosen and not (models and all(model in PRESETS for model in models)):
        fail(f"{chosen[0]} goes with a preset: name one of {', '.join(PRESETS)}")
    try:
        costs = [of(model) for model in models] if models else paper_costs(steps=steps)
    except (ValueError, OSError) as error:
        fail(str(error))
    typer.echo(json.dumps([asdict(c) for c in costs], indent=2) if as_json else "\n".join(table(costs)))


@app.command("import")
def import_command(
    source: Annotated[str, typer.Argument(help="An official .pt, a diffusers folder, or a hub id such as facebook/DiT-XL-2-256.")],
    destination: Annotated[Path, typer.Argument(metavar="DEST", help="The checkpoint folder to write.")],
    heads: Annotated[
        int | None, typer.Option(min=1, help="Attention heads; by default the folder's, or the preset's of this shape.")
    ] = None,
    vae: Annotated[str | None, typer.Option(help="A diffusers VAE, folder or hub id (stabilityai/sd-vae-ft-ema).")] = None,
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Of the stored DiT.")] = "float32",
    time_features: Annotated[Literal["official", "diffusers"] | None, typer.Option(help="By default those of the source's format.")] = None,
    labels: Annotated[Path | None, typer.Option(help="Names of the classes: id2label or a list in .json, or one class a line.")] = None,
) -> None:
    """Make a checkpoint of published weights, of the official code or of diffusers."""
    from model.checkpoint import DTYPES, save
    from model.convert import import_checkpoint
    from training.card import model_card

    if destination.exists():
        fail(f"{destination} exists; an import is never written over anything")
    try:
        found = import_checkpoint(source, heads=heads, vae=vae, time_features=time_features, labels=labels)
        card = model_card(found.checkpoint.config, {})
        identity = save(destination, found.checkpoint, dtype=DTYPES[dtype], card=card)
    except (ValueError, OSError) as error:
        fail(str(error))
    typer.echo("\n".join([*found.notes, f"wrote {destination}, checkpoint {identity[:12]}, the DiT in {dtype}"]))


@app.command("export")
def export_command(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder, or a registry entry with versions.")],
    destination: Annotated[Path, typer.Argument(metavar="DEST", help="The file (official) or folder (diffusers) to write.")],
    format: Annotated[Literal["diffusers", "official"], typer.Option(help="A folder for DiTPipeline, or the official code's .pt.")],
) -> None:
    """Write a checkpoint for diffusers or for the official code."""
    from model.checkpoint import load
    from model.export import export_diffusers, export_official

    try:
        notes = (export_official if format == "official" else export_diffusers)(load(checkpoint), destination)
    except (ValueError, OSError) as error:
        fail(str(error))
    typer.echo("\n".join([f"wrote {destination} ({format})", *notes]))


@app.command("up")
def up_command(
    model: Annotated[
        str | None, typer.Option(help="A checkpoint folder, or whatever `dit import` takes; by default what DIT_CHECKPOINTS holds.")
    ] = None,
) -> None:
    """Run everything on this machine: embedded server, worker, API and page."""
    from app.local import StartError, up

    try:
        up(_settings(), model)
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
