"""`dit evaluate` and `dit tune`: how good a checkpoint is, and with which defaults it is best."""

import os
from pathlib import Path
from typing import Annotated

import typer

from app.commands.common import CheckpointArgument, DataOption, fail, read_settings

app = typer.Typer()


@app.command("evaluate")
def evaluate_command(
    checkpoint: CheckpointArgument,
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
    # Before torch is imported, as `dit worker` does: the graphs compiled by one serve the other.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(read_settings().data.resolve() / "compiled"))
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
