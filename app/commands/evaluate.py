"""`dit evaluate` and `dit tune`: how good a checkpoint is, and with which defaults it is best."""

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from app.commands.common import CheckpointArgument, DataOption, fail, read_settings

app = typer.Typer()


@app.command("evaluate")
def evaluate_command(
    checkpoint: Annotated[Path | None, typer.Argument(help="A checkpoint folder, or a registry entry with versions.")] = None,
    data: Annotated[Path | None, typer.Option(help="The folder it was trained on: measures beside their floors on real images.")] = None,
    reference: Annotated[Path | None, typer.Option(help="ADM's statistics, or real pictures (.npz, PNGs): FID and its kin.")] = None,
    inception: Annotated[Path | None, typer.Option(help="torch-fidelity's file of Inception's weights, for --reference.")] = None,
    pictures: Annotated[Path | None, typer.Option(help="Pictures of any model (.npz, PNGs) in place of a checkpoint's.")] = None,
    samples: Annotated[int, typer.Option(help="Pictures to draw; the paper's numbers are of 50000.")] = 10_000,
    labels: Annotated[
        Literal["balanced", "random"] | None, typer.Option(help="By default equal shares with --data, else drawn as by the paper's script.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Sampling steps; by default the checkpoint's.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="By default the checkpoint's.")] = None,
    guidance_channels: Annotated[
        Literal["all", "first-three"], typer.Option(help="What guidance moves of a latent; the paper's code moves the first three.")
    ] = "all",
    sampler: Annotated[str | None, typer.Option(help="By default the checkpoint's.")] = None,
    save_npz: Annotated[Path | None, typer.Option(help="Write the pictures as ADM's .npz.")] = None,
    save_png: Annotated[Path | None, typer.Option(help="Write the pictures as PNGs into a new folder.")] = None,
    save: Annotated[bool, typer.Option(help="Write metrics, plots, grid and model card into the checkpoint.")] = True,
) -> None:
    """How good pictures are: by a classifier trained on the same data, by the paper's protocol, or by both."""
    if (checkpoint is None) == (pictures is None):
        fail("name a checkpoint to draw from, or --pictures of any model, and not both")
    if pictures and (data or save_npz or save_png):
        fail("--pictures goes with --reference and --inception alone")
    _set_compiler_cache()
    from training.card_metrics import table
    from training.evaluate import evaluate
    from training.inception_measures import evaluate_pictures

    try:
        if pictures:
            typer.echo("\n".join(table(evaluate_pictures(pictures, reference, inception))))
            return
        assert checkpoint is not None
        evaluate(
            checkpoint,
            data,
            reference=reference,
            inception=inception,
            samples=samples,
            labels=labels,
            steps=steps,
            guidance_scale=guidance_scale,
            guidance_channels=guidance_channels,
            sampler=sampler,
            save_npz=save_npz,
            save_png=save_png,
            save=save,
            show=typer.echo,
        )
    except (ValueError, OSError) as error:
        fail(str(error))


def _set_compiler_cache() -> None:
    """Before torch is imported, as `dit worker` does: the graphs compiled by one serve the other."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(read_settings().data.resolve() / "compiled"))


@app.command("tune")
def tune_command(
    checkpoint: CheckpointArgument,
    data: DataOption,
    steps: Annotated[str | None, typer.Option(help="5,8,10: what to try; by default few that suit the model.")] = None,
    samplers: Annotated[str | None, typer.Option(help="a,b: the first is the one that guidance scales are compared with.")] = None,
    guidance_scales: Annotated[str | None, typer.Option(help="1,1.5,2: 1 is no guidance.")] = None,
    intervals: Annotated[str | None, typer.Option(help="0-1,0.1-0.8: where in t/T to guide; 0 is clean.")] = None,
    block_cache: Annotated[str | None, typer.Option(help="2,3: what is chosen is measured with these block caches too.")] = None,
    samples: Annotated[int, typer.Option(help="Pictures of a setting in the first stage.")] = 1000,
    final_samples: Annotated[int, typer.Option(help="Pictures of each of the best settings, which decide.")] = 10_000,
    log: Annotated[Path | None, typer.Option(help="What was measured, and is not measured again; by default runs/tune/HASH.jsonl.")] = None,
    save: Annotated[bool, typer.Option(help="Write defaults, qualities, table, plot and model card into the checkpoint.")] = True,
) -> None:
    """The fewest network evaluations for the best pictures: steps, sampler and guidance, measured."""
    _set_compiler_cache()
    from training.search import interval_of, listed
    from training.tune import tune

    try:
        tune(
            checkpoint,
            data,
            steps=listed("--steps", steps, int),
            samplers=listed("--samplers", samplers, str),
            guidance_scales=listed("--guidance-scales", guidance_scales, float),
            intervals=listed("--intervals", intervals, interval_of),
            block_caches=listed("--block-cache", block_cache, int),
            samples=samples,
            final_samples=final_samples,
            log=log,
            save=save,
            show=typer.echo,
        )
    except (ValueError, OSError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("stopped; what was measured is in the log, and the same command goes on from there", 130)
