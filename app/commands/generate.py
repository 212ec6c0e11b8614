"""`dit generate`: pictures of a server that runs; `dit show`: how one was made."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from app.commands.common import fail

app = typer.Typer()


@app.command("generate")
def generate_command(
    classes: Annotated[
        list[str] | None,
        typer.Argument(metavar="CLASS", help="Name or index; several make one picture each; - is the unconditional picture."),
    ] = None,
    unconditional: Annotated[bool, typer.Option("--unconditional", help="In place of CLASS: the unconditional picture.")] = False,
    num_images: Annotated[int | None, typer.Option("--num-images", "-n", help="Pictures of one class; by default 1.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Where they are written; made if there is none.")] = Path("."),
    url: Annotated[str, typer.Option(envvar="DIT_URL", help="The server.")] = "http://127.0.0.1:8000",
    api_key: Annotated[str | None, typer.Option(envvar="DIT_API_KEY", help="Where the server asks for one.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="By default the model's; 1 is none.")] = None,
    steps: Annotated[int | None, typer.Option(help="By default the model's.")] = None,
    quality: Annotated[Literal["draft", "standard", "best"] | None, typer.Option(help="A measured setting, in place of --steps.")] = None,
    sampler: Annotated[str | None, typer.Option(help="By default the model's.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the first picture, the next has the next; by default drawn.")] = None,
    model: Annotated[str | None, typer.Option(help="Needed where several are served.")] = None,
    timeout: Annotated[float | None, typer.Option(min=0, help="Seconds after which the job is canceled; by default none.")] = None,
) -> None:
    """Make pictures on a server that runs, and write each as a file such as sneaker-7.png: class, seed."""
    from app.client import ClientError, Options
    from app.drawing import UNCONDITIONAL, Stopped, class_label, draw

    if bool(classes) == unconditional:
        fail("name a class, or say --unconditional", 2)
    options: Options = {
        "guidance_scale": guidance_scale,
        "steps": steps,
        "quality": quality,
        "sampler": sampler,
        "seed": seed,
        "num_images": num_images,
        "model": model,
    }
    try:
        draw(url, api_key, class_label(classes or [UNCONDITIONAL]), options, out, timeout)
    except Stopped as stop:
        fail(str(stop), stop.code)
    except (ClientError, ValueError, OSError) as error:
        fail(" ".join(str(error).split()))
    except KeyboardInterrupt:
        fail("stopped; whether the server has the job is not known", 130)


@app.command("show")
def show_command(picture: Annotated[Path, typer.Argument(help="A PNG that dit made.")]) -> None:
    """How a picture was made: its checkpoint, and the request that makes it again."""
    from app.picture_request import read_picture, shown

    try:
        typer.echo(shown(read_picture(picture)))
    except (ValueError, OSError) as error:
        fail(str(error))
