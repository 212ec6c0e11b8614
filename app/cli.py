"""`dit …`: every command. Heavy imports happen inside the command that needs them."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

if TYPE_CHECKING:
    from redis import Redis

    from app.settings import Settings
    from app.usage import Usage

app = typer.Typer(
    help="Class-conditional image generation with a Diffusion Transformer.", no_args_is_help=True, pretty_exceptions_enable=False
)
train = typer.Typer(help="Train the autoencoder, then the DiT on its latents.", no_args_is_help=True)
app.add_typer(train, name="train")
models = typer.Typer()
app.add_typer(models, name="models")
jobs = typer.Typer(help="Jobs that were given up.", no_args_is_help=True)
app.add_typer(jobs, name="jobs")
key = typer.Typer(help="Keys of the API, in the file that DIT_API_KEYS_FILE names.", no_args_is_help=True)
app.add_typer(key, name="key")

queues = typer.Typer()
app.add_typer(queues, name="queues")
health = typer.Typer(help="For health checks: status 0, or 1 and what is wrong.", no_args_is_help=True)
app.add_typer(health, name="health")

DataOption = Annotated[Path, typer.Option("--data", help="Folder of IDX files, or of one sub-folder of images per class.")]
CONFIGURATION_ERROR = 78  # see app.local: the supervisor does not start such a child again

JsonOption = Annotated[bool, typer.Option("--json", help="A list of objects.")]
ModelArgument = Annotated[str, typer.Argument(help="A model of the registry.")]
ServedArgument = Annotated[str, typer.Argument(help="A model that is served, or was.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Also where Redis cannot tell which versions are needed.")]
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


@app.command("tune")
def tune_command(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder, or a registry entry with versions.")],
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
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(_settings().data.resolve() / "compiled"))
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


@models.callback(invoke_without_command=True)
def models_command(context: typer.Context, as_json: JsonOption = False) -> None:
    """Models of the registry and their versions; without a command, lists them."""
    if context.invoked_subcommand is None:
        list_models_command(as_json)
    elif as_json:
        fail(f"--json does not go before {context.invoked_subcommand}")


@models.command("list")
def list_models_command(
    as_json: JsonOption = False,
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte, to find what is damaged.")] = False,
) -> None:
    """Every version, the newest first: whether a worker serves it, and how many jobs wait for it or run on it."""

    from app.usage import UsageUnknown, find_usage
    from model.registry import models, versions

    settings = _settings()
    usage, unknown = None, "DIT_REDIS_URL is not set, and no `dit up` runs"
    try:
        usage = find_usage(settings.redis_url, settings.data, settings.redis_password)
    except UsageUnknown as reason:
        unknown = str(reason)
    if usage is None:
        typer.echo(f"dit: what is served and waited for is unknown: {unknown}", err=True)
    rows = [
        {
            "model": model,
            "version": version.hash[:12] or version.name,
            "hash": version.hash or None,
            "latest": version.is_latest,
            "published_at": None if version.published_at is None else _iso(version.published_at),
            "size_bytes": version.size_bytes,
            "served": None if usage is None else (model, version.hash) in usage.served,
            "jobs": None if usage is None else usage.jobs.get(version.hash, 0),
            "error": version.error,
        }
        for model, entry in models(settings.checkpoints).items()
        for version in versions(entry, thorough=verify)
    ]
    table = [{name: value for name, value in row.items() if name != "hash"} | {"error": row["error"] or ""} for row in rows]
    _tell(rows, as_json, none=f"no model in {settings.checkpoints.resolve()}", table=table)


@models.command("publish")
def publish_command(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder, or a registry entry with versions.")],
    model: Annotated[str, typer.Argument(help="The model's name; made if there is none.")],
) -> None:
    """Copy a checkpoint into the registry as the latest version of a model; workers that serve it take it over."""
    from model.registry import publish

    try:
        identity = publish(_settings().checkpoints, model, checkpoint)
    except (ValueError, OSError) as error:
        fail(str(error))
    typer.echo(f"published {checkpoint} as {model}, version {identity[:12]}")


@models.command("rollback")
def rollback_command(
    model: ModelArgument,
    version: Annotated[
        str | None, typer.Argument(help="The beginning of its hash; by default the one published before the latest.")
    ] = None,
) -> None:
    """Make an older version the latest."""
    from model.registry import roll_back

    try:
        identity = roll_back(_entry(model), version)
    except (ValueError, OSError) as error:
        fail(str(error))
    typer.echo(f"the latest version of {model} is {identity[:12]}")


@models.command("remove")
def remove_command(
    model: ModelArgument,
    version: Annotated[str, typer.Argument(help="The beginning of its hash.")],
    force: ForceOption = False,
) -> None:
    """Delete a version that is not the latest and that no job and no worker needs."""
    from model.registry import choose, remove

    try:
        entry = _entry(model)
        chosen, usage = choose(entry, version), _usage(force)
        needed = usage and usage.of(model, chosen.hash)
        if needed:
            fail(f"version {chosen.name} of {model} stays: {needed}")
        typer.echo(f"removed version {remove(entry, chosen.name)} of {model}")
    except (ValueError, OSError) as error:
        fail(str(error))


@models.command("prune")
def prune_command(
    model: ModelArgument,
    keep: Annotated[int, typer.Option(min=0, help="Versions to keep besides the latest, the newest first.")] = 0,
    force: ForceOption = False,
) -> None:
    """Delete every version that is not the latest and that no job and no worker needs."""
    from model.registry import remove, versions

    try:
        entry, usage = _entry(model), _usage(force)
        found = versions(entry)
        if not any(version.is_latest and not version.error for version in found):
            fail(f"nothing is removed: no sound version of {model} is the latest; publish one or roll back first")
        superfluous = [version for version in found if not version.is_latest][keep:]
        for version in superfluous:
            needed = usage and usage.of(model, version.hash)
            typer.echo(f"kept version {version.name}: {needed}" if needed else f"removed version {remove(entry, version.name)}")
    except (ValueError, OSError) as error:
        fail(str(error))
    if not superfluous:
        typer.echo(f"nothing to remove of {model}")


def _entry(model: str) -> Path:
    from model.registry import models

    registry = _settings().checkpoints
    found = models(registry)
    if model not in found:
        raise ValueError(f"no model {model!r} in {registry.resolve()}, which has: {', '.join(found) or 'none'}")
    return found[model]


def _usage(force: bool) -> "Usage | None":
    """What must not be removed; None if there is no queue, or if that was not to matter."""
    from app.usage import UsageUnknown, find_usage

    settings = _settings()
    try:
        return find_usage(settings.redis_url, settings.data, settings.redis_password)
    except UsageUnknown as reason:
        if not force:
            fail(f"nothing is removed while jobs may need it ({reason}); --force removes it all the same")
        return None


@jobs.command("dead")
def dead_command(as_json: JsonOption = False) -> None:
    """Jobs that were given up since their workers died, the newest first."""
    from dataclasses import asdict

    from app.dead import dead_jobs

    with _redis() as redis:
        rows = [{**asdict(job), "ended_at": _iso(job.ended_at)} for job in dead_jobs(redis)]
    _tell(rows, as_json, none="no job was given up")


@jobs.command("requeue")
def requeue_command(
    ids: Annotated[list[str] | None, typer.Argument(metavar="[ID]…")] = None,
    all_of_them: Annotated[bool, typer.Option("--all", help="Every job that `dit jobs dead` lists.")] = False,
) -> None:
    """Start given up jobs afresh, with all their attempts."""
    from app.dead import dead_jobs, requeue

    if bool(ids) == all_of_them:
        fail("name the jobs that shall start afresh, or say --all")
    refused = False
    with _redis() as redis:
        for job_id in ids or [job.id for job in dead_jobs(redis)]:
            try:
                requeue(redis, job_id)
                typer.echo(f"job {job_id} waits again")
            except ValueError as error:
                typer.echo(f"dit: {error}", err=True)
                refused = True
    if refused:
        raise typer.Exit(1)


@queues.callback(invoke_without_command=True)
def queues_command(context: typer.Context, as_json: JsonOption = False) -> None:
    """What waits and runs of each model, and whether it is held up; without a command, lists it."""
    from dataclasses import asdict

    from app.queues import look

    if context.invoked_subcommand is not None:
        if as_json:
            fail(f"--json does not go before {context.invoked_subcommand}")
        return
    with _redis() as redis:
        rows = [{**asdict(queue), "oldest_s": round(queue.oldest_s, 1)} for queue in look(redis)]
    _tell(rows, as_json, none="no model was ever served")


@queues.command("pause")
def pause_command(model: ServedArgument) -> None:
    """Workers take no more jobs of it; what runs goes on, and jobs are accepted."""
    _set_queue(model, "paused")


@queues.command("drain")
def drain_command(model: ServedArgument) -> None:
    """No more jobs of it are accepted; those that wait are worked off."""
    _set_queue(model, "draining")


@queues.command("resume")
def resume_command(model: ServedArgument) -> None:
    """As if it had never been paused or drained."""
    _set_queue(model, "open")


def _set_queue(model: str, state: str) -> None:
    from app.queues import set_state

    try:
        with _redis() as redis:
            set_state(redis, model, state)
    except ValueError as error:
        fail(str(error))
    typer.echo(f"the queue of {model} is {state}")


@contextmanager
def _redis() -> "Iterator[Redis]":
    """The Redis that there is to ask; one that does not answer ends the command with one line."""
    from redis.exceptions import RedisError

    from app.usage import open_redis

    settings = _settings()
    try:
        client = open_redis(settings.redis_url, settings.data, settings.redis_password)
    except ValueError as error:
        fail(f"DIT_REDIS_URL: {error}", CONFIGURATION_ERROR)
    if client is None:
        fail(f"there is no Redis to ask: DIT_REDIS_URL is not set, and no `dit up` runs over {settings.data.resolve()}")
    try:
        with client:
            yield client
    except (RedisError, OSError) as error:
        fail(f"Redis does not answer: {error}")


def _iso(seconds: float) -> str:
    from datetime import UTC, datetime

    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _tell(rows: list[dict[str, Any]], as_json: bool, *, none: str, table: list[dict[str, Any]] | None = None) -> None:
    """A list of objects, or a table (of `table`, where that differs), or `none` for no rows."""
    import json

    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    elif rows:
        _print_table(rows if table is None else table)
    else:
        typer.echo(none)


def _print_table(rows: list[dict[str, Any]]) -> None:
    """A column per key; what is None is not known."""

    def cell(value: Any) -> str:
        if isinstance(value, bool):
            return "yes" if value else ""
        return "?" if value is None else str(value)

    lines = [list(rows[0]), *([cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        typer.echo("  ".join(map(str.ljust, line, widths)).rstrip())


@key.command("create")
def create_key_command(
    name: Annotated[str, typer.Option(help="Whose it is; jobs and limits belong to the name.")],
    scope: Annotated[Literal["generate", "train", "admin"], typer.Option(help="What it may; an admin may everything.")],
    per_minute: Annotated[int | None, typer.Option(min=1, help="Calls a minute; by default without a limit.")] = None,
    in_flight: Annotated[int | None, typer.Option(min=1, help="Jobs that have not ended; by default without a limit.")] = None,
) -> None:
    """Make a key and print it: this once, since only its hash is kept."""
    from app.keys import create_key

    path = _key_file()
    try:
        entry, secret = create_key(path, name, scope, per_minute=per_minute, in_flight=in_flight)
    except (ValueError, OSError) as error:
        fail(str(error))
    typer.echo(f"dit: key {entry.id} of {name} is in {path}; nobody can show it again:", err=True)
    typer.echo(secret)


@key.command("list")
def list_keys_command(as_json: JsonOption = False) -> None:
    """Every key, in the order in which they were made; what is kept of a secret is not told."""
    from dataclasses import asdict

    from app.auth import read_keys

    try:
        rows = [{name: value for name, value in asdict(entry).items() if name != "sha256"} for entry in read_keys(_key_file())]
    except ValueError as error:
        fail(str(error))
    table = [{name: "" if value is None else value for name, value in row.items()} for row in rows]
    _tell(rows, as_json, none="no key was made", table=table)


@key.command("revoke")
def revoke_key_command(identity: Annotated[str, typer.Argument(metavar="ID", help="As `dit key list` shows it.")]) -> None:
    """Refuse a key from now on; a running API notices at its next call."""
    from app.keys import revoke_key

    try:
        entry = revoke_key(_key_file(), identity)
    except (ValueError, OSError) as error:
        fail(str(error))
    typer.echo(f"revoked key {entry.id} of {entry.name}")


def _key_file() -> Path:
    path = _settings().api_keys_file
    if path is None:
        fail("DIT_API_KEYS_FILE must name the file that holds the keys", CONFIGURATION_ERROR)
    return path


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


@app.command("up")
def up_command(
    model: Annotated[
        str | None, typer.Option(help="A checkpoint folder, or whatever `dit import` takes; by default what DIT_CHECKPOINTS holds.")
    ] = None,
) -> None:
    """Run everything on this machine: embedded server, worker, API and page."""
    from app.local import StartError, up

    try:
        up(_door_settings(), model)
    except StartError as error:
        fail(str(error))


@app.command("api")
def api_command() -> None:
    """Run the HTTP API alone, over the Redis of DIT_REDIS_URL."""
    import uvicorn

    from app.door import Door, raise_file_limit
    from app.local import end_with_supervisor
    from app.logs import log_to_stderr
    from app.main import create_app

    settings = _door_settings()
    log_to_stderr(settings.log_format)
    end_with_supervisor()
    raise_file_limit()
    try:
        application = create_app(settings)
    except ValueError as error:
        fail(str(error), CONFIGURATION_ERROR)
    how: dict[str, Any] = {"http": Door, "log_config": None, "log_level": "warning", "timeout_graceful_shutdown": 3}
    uvicorn.run(application, host=settings.host, port=settings.port, **how)


@app.command("worker")
def worker_command() -> None:
    """Run one worker over the Redis of DIT_REDIS_URL."""
    from app.local import end_with_supervisor
    from app.logs import log_to_stderr

    settings = _settings()
    if settings.redis_url is None:
        fail("DIT_REDIS_URL must be set for a worker alone (`dit up` brings a server of its own)", CONFIGURATION_ERROR)
    log_to_stderr(settings.log_format)
    end_with_supervisor()
    from worker.gpus import see_only_ones_own
    from worker.pulse import pulse_path

    if settings.device == "auto":
        see_only_ones_own(settings.data)
    # Before torch is imported, which reads it once: compiled graphs outlive the process, so that a second start is quick.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(settings.data.resolve() / "compiled"))
    from worker.serve import serve

    try:
        serve(
            redis_url=settings.redis_url,
            redis_password=settings.redis_password,
            registry=settings.checkpoints,
            models=settings.models,
            device=settings.device,
            dtype=settings.dtype,
            max_rows=settings.max_rows,
            compile=settings.compile,
            reproducible=settings.reproducible,
            block_cache=settings.block_cache,
            drain_s=settings.drain_seconds,
            hang_s=settings.hang_seconds,
            trace=settings.trace,
            pulse=pulse_path(settings.data),
        )
    except ValueError as error:  # CheckpointError is one
        fail(str(error), CONFIGURATION_ERROR)


@health.command("api")
def api_health_command() -> None:
    """Whether the API of this machine answers."""
    from app.health import ailment

    settings = _settings()
    _tell_health("the API", ailment(settings.host, settings.port))


@health.command("worker")
def worker_health_command(
    alive: Annotated[bool, typer.Option("--alive", help="Only whether its loop goes round: what a restart could mend.")] = False,
) -> None:
    """Whether the worker of this host goes round its loop, is known to Redis and serves a model."""
    from worker.pulse import ailment, pulse_path

    _tell_health("the worker", ailment(pulse_path(_settings().data), only_alive=alive))


def _tell_health(who: str, ailment: str | None) -> None:
    if ailment is not None:
        fail(ailment)
    typer.echo(f"{who} is well")


def _settings() -> "Settings":
    from app.settings import load_settings

    try:
        return load_settings()
    except ValueError as error:
        fail(str(error), CONFIGURATION_ERROR)


def _door_settings() -> "Settings":
    """Of a command that opens the port."""
    from app.auth import read_keys
    from app.settings import check_exposure

    settings = _settings()
    try:
        check_exposure(settings)
    except ValueError as error:
        fail(str(error), CONFIGURATION_ERROR)
    try:
        if settings.api_keys_file is not None:
            read_keys(settings.api_keys_file)
    except ValueError as error:
        fail(f"DIT_API_KEYS_FILE={error}", CONFIGURATION_ERROR)
    return settings


def main() -> None:
    app()


if __name__ == "__main__":
    main()
