"""`dit train`: the two stages of a training run."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from app.commands.common import DataOption, fail

app = typer.Typer(help="Train the autoencoder, then the DiT on its latents.", no_args_is_help=True)

RecipeArgument = Annotated[str, typer.Argument(help="A bundled recipe's name, or a TOML file.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on with the run saved in --out.")]
MicroBatchOption = Annotated[int, typer.Option(help="Samples that a process takes at once, for what does not fit; 0: all of its batch.")]
CompileOption = Annotated[bool, typer.Option("--compile", help="Compile with torch.compile: a minute or more first, then quicker steps.")]
CheckpointingOption = Annotated[
    bool, typer.Option("--activation-checkpointing", help="Compute activations twice instead of keeping them: less memory, more time.")
]
BoardOption = Annotated[bool, typer.Option(help="Write OUT/tensorboard too.")]


@app.command("vae")
def train_vae_command(
    recipe: RecipeArgument,
    data: DataOption,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; by default runs/RECIPE/vae.")] = None,
    resume: ResumeOption = False,
    micro_batch_size: MicroBatchOption = 0,
    compile: CompileOption = False,
    activation_checkpointing: CheckpointingOption = False,
    tensorboard: BoardOption = True,
) -> None:
    """Stage one: images → latents and back."""

    def run() -> Path:
        from training.config import Execution, load_recipe
        from training.train_vae import train_vae

        loaded = load_recipe(recipe)
        execution = Execution(micro_batch_size, compile, activation_checkpointing, tensorboard=tensorboard)
        return train_vae(loaded, data, out or Path("runs") / loaded.name / "vae", resume=resume, execution=execution)

    _train(run)


@app.command("dit")
def train_dit_command(
    recipe: RecipeArgument,
    data: DataOption,
    vae: Annotated[Path | None, typer.Option(help="Folder of the trained VAE; by default runs/RECIPE/vae.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; by default runs/RECIPE/dit.")] = None,
    resume: ResumeOption = False,
    new_latents: Annotated[bool, typer.Option("--new-latents", help="Encode anew what another VAE or other data left in --out.")] = False,
    ema: Annotated[float | None, typer.Option(help="Of several ema_decay, the one to publish; by default the first.")] = None,
    micro_batch_size: MicroBatchOption = 0,
    compile: CompileOption = False,
    activation_checkpointing: CheckpointingOption = False,
    shard: Annotated[bool, typer.Option("--shard", help="Spread the network over the processes of torchrun (FSDP2).")] = False,
    tensorboard: BoardOption = True,
) -> None:
    """Stage two: the DiT on cached latents; writes a checkpoint to OUT/checkpoint."""

    def run() -> Path:
        from training.config import Execution, load_recipe
        from training.train_dit import train_dit

        loaded = load_recipe(recipe)
        runs = Path("runs") / loaded.name
        execution = Execution(micro_batch_size, compile, activation_checkpointing, shard, tensorboard)
        return train_dit(
            loaded, data, vae or runs / "vae", out or runs / "dit", resume=resume, execution=execution, publish=ema, new_latents=new_latents
        )

    _train(run)


def _train(run: Callable[[], Path]) -> None:
    from training.stopping import Interrupted

    try:
        wrote = run()
        if os.environ.get("RANK", "0") == "0":  # of torchrun's processes
            typer.echo(f"wrote {wrote}")
    except Interrupted as stop:
        fail(str(stop), 130)
    except (ValueError, FloatingPointError, OSError) as error:
        fail(str(error))
