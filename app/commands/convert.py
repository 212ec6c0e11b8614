"""`dit cost`, `dit import` and `dit export`: what a model costs, and the ways into and out of our checkpoints."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from app.commands.common import CheckpointArgument, fail
from app.commands.rows import JsonOption

app = typer.Typer()


@app.command("cost")
def cost_command(
    models: Annotated[list[str] | None, typer.Argument(metavar="[MODEL]…", help="Presets (DiT-XL/2) or checkpoint folders.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Pixels of a preset's pictures; by default 256.")] = None,
    block: Annotated[
        str | None, typer.Option(help="A preset's block: adaln-zero (the default), adaln, cross-attention or in-context.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Guided evaluations of a whole picture.")] = 250,
    as_json: JsonOption = False,
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
    checkpoint: CheckpointArgument,
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
