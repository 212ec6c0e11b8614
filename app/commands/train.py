"""`dit train`: the two stages of a training run."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from app.commands.common import DataOption, fail

app = typer.Typer(help="Train the autoencoder, then the DiT on its latents.", no_args_is_help=True)

RecipeArgument = Annotated[str, typer.Argument(help="A bundled recipe's name, or a TOML file.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on with the run saved in --out.")]


@app.command("vae")
def train_vae_command(
    recipe: RecipeArgument,
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


@app.command("dit")
def train_dit_command(
    recipe: RecipeArgument,
    data: DataOption,
    vae: Annotated[Path | None, typer.Option(help="Folder of the trained VAE; by default runs/RECIPE/vae.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; by default runs/RECIPE/dit.")] = None,
    resume: ResumeOption = False,
    new_latents: Annotated[bool, typer.Option("--new-latents", help="Encode anew what another VAE or other data left in --out.")] = False,
) -> None:
    """Stage two: the DiT on cached latents; writes a checkpoint to OUT/checkpoint."""

    def run() -> Path:
        from training.config import load_recipe
        from training.train_dit import train_dit

        loaded = load_recipe(recipe)
        runs = Path("runs") / loaded.name
        return train_dit(loaded, data, vae or runs / "vae", out or runs / "dit", resume=resume, new_latents=new_latents)

    _train(run)


def _train(run: Callable[[], Path]) -> None:
    from training.loop import Interrupted

    try:
        typer.echo(f"wrote {run()}")
    except Interrupted as stop:
        fail(str(stop), 130)
    except (ValueError, FloatingPointError, OSError) as error:
        fail(str(error))
