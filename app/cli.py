"""`dit …`: the commands of app/commands/, one file per group, in the order in which `dit --help` lists them.

A new command goes into the file of its group, or into a file of its own with an `app = typer.Typer()`, which is added here: with a name, as
`dit NAME …`; without one, its commands are `dit …` themselves. Every file is imported at every start, so what is heavy (torch, redis,
fastapi, our other packages) is imported inside the command that needs it.
"""

import typer

from app.commands import convert, evaluate, generate, health, jobs, keys, models, queues, serve, train

app = typer.Typer(
    help="Class-conditional image generation with a Diffusion Transformer.", no_args_is_help=True, pretty_exceptions_enable=False
)
app.add_typer(evaluate.app)
app.add_typer(convert.app)
app.add_typer(generate.app)
app.add_typer(serve.app)
app.add_typer(train.app, name="train")
app.add_typer(models.app, name="models")
app.add_typer(jobs.app, name="jobs")
app.add_typer(keys.app, name="key")
app.add_typer(queues.app, name="queues")
app.add_typer(health.app, name="health")


def main() -> None:
    app()


if __name__ == "__main__":
    main()
