"""`dit generate`: a job over HTTP, its progress on the terminal, its pictures in a folder."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from app.client import (
    PATIENCE_S,
    ApiError,
    ClassLabel,
    Client,
    ClientError,
    Image,
    ImageEvent,
    Job,
    Notice,
    Options,
    ProgressEvent,
    QueuedEvent,
)
from app.picture_files import picture_stem, write_picture

INTERRUPTED = 130  # exit status of a command that Ctrl-C ended
UNCONDITIONAL = "-"


class Stopped(Exception):
    """The job was given up; one clear line and an exit status."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def class_label(words: Sequence[str]) -> ClassLabel | list[ClassLabel]:
    """Words of the command line → `class_label`: digits are an index, `-` is the unconditional picture, all else is a name."""
    labels: list[ClassLabel] = [
        None if word == UNCONDITIONAL else int(word) if re.fullmatch("[0-9]{1,9}", word) else word  # more digits are no index of anything
        for word in words
    ]
    return labels[0] if len(labels) == 1 else labels


class Display(Protocol):
    """Where a person sees how far it is. Paths go to stdout, everything else to stderr."""

    def say(self, text: str) -> None: ...
    def step(self, step: int, steps: int) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


class Lines:
    """For a log or a pipe: a line at every tenth of the way."""

    def __init__(self) -> None:
        self._tenth = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def step(self, step: int, steps: int) -> None:
        if (tenth := 10 * step // steps) != self._tenth:
            self._tenth = tenth
            self.say(f"step {step} of {steps}")


class Bar:
    """For a terminal. What is printed to stdout meanwhile goes above the bar, if it goes to a terminal too."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console, redirect_stdout=sys.stdout.isatty())
        self._task = self._progress.add_task("waiting", total=None)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)

    def step(self, step: int, steps: int) -> None:
        self._progress.update(self._task, description="steps", completed=step, total=steps)


def display() -> Display:
    return Bar(Console(stderr=True)) if sys.stderr.isatty() else Lines()


def draw(url: str, api_key: str | None, label: ClassLabel | list[ClassLabel], options: Options, out: Path, timeout_s: float | None) -> None:
    """Write each picture into `out` when it is finished and print its path.

    Stopped after Ctrl-C, after `timeout_s` and for a job that does not succeed; ClientError, ValueError or OSError if it cannot be done.
    """
    out.mkdir(parents=True, exist_ok=True)  # before the server works for nothing
    with Client(url, api_key, patience_s=0) as impatient:  # a server that is not there is told at once
        labels = {model.id: model.labels for model in impatient.models()}
    patience_s = PATIENCE_S if timeout_s is None else min(PATIENCE_S, timeout_s)
    with display() as shown, Client(url, api_key, patience_s=patience_s, on_pause=_teller(shown)) as client:
        job = client.generate(label, **options)
        place = f", {job.queue_position} before it" if job.queue_position else ""
        wait = f", about {job.estimated_wait_s:.0f} s from its start" if job.estimated_wait_s else ""
        shown.say(f"job {job.id} is {job.status}{place}{wait}")
        _follow(client, job, _Folder(out, labels.get(str(job.request["model"]), [])), shown, timeout_s)


def _teller(shown: Display) -> Notice:
    return lambda reason, pause_s: shown.say(f"{reason}; trying again in {pause_s:.3g} s")


def _follow(client: Client, job: Job, folder: "_Folder", shown: Display, timeout_s: float | None) -> None:
    try:
        for event in client.events(job.id, timeout_s=timeout_s):
            if isinstance(event, ProgressEvent):
                shown.step(event.step, event.steps)
            elif isinstance(event, ImageEvent):
                folder.fetch(client, job, event.index, event, shown)
            elif isinstance(event, QueuedEvent) and event.retry:
                shown.say("its worker ended or gave it back; it starts again")
        job = client.job(job.id)
        for index, image in enumerate(job.images):  # what no event told, or what its worker took along
            folder.fetch(client, job, index, image, shown)
    except KeyboardInterrupt:
        raise Stopped(f"stopped; {_cancel(client, job)}", INTERRUPTED) from None
    except TimeoutError as error:
        raise Stopped(f"{error}; {_cancel(client, job)}", 1) from None
    if job.status != "succeeded":
        raise Stopped(f"job {job.id} {job.status}{f': {job.error}' if job.error else ''}", 1)
    shown.step(job.progress.steps, job.progress.steps)


def _cancel(client: Client, job: Job) -> str:
    try:
        status = client.cancel(job.id).status
    except ClientError as error:
        return f"job {job.id} could not be canceled: {error}"
    except KeyboardInterrupt:
        return f"job {job.id} may go on"
    return f"job {job.id} {'stops at its next step' if status == 'canceling' else f'is {status}'}"


class _Folder:
    """The pictures of one job that are written."""

    def __init__(self, path: Path, labels: Sequence[Sequence[str]]) -> None:
        self.path, self.labels = path, labels
        self._written: dict[int, str] = {}  # index → sha256

    def fetch(self, client: Client, job: Job, index: int, image: Image | ImageEvent, shown: Display) -> None:
        """Write it unless it is written. A picture of a running job that has gone with its worker comes again, and is left till then."""
        if not 0 <= index < len(job.class_labels):
            raise ClientError(f"the server tells of picture {index} of job {job.id}, which was asked for {len(job.class_labels)}")
        if self._written.get(index) == image.sha256:
            return
        try:
            png = client.image(job.id, index, sha256=image.sha256)
        except ApiError as error:
            if error.status == 404 and isinstance(image, ImageEvent):
                return
            raise
        stem = picture_stem(job.class_labels[index], self.labels, image.seed)
        path = write_picture(self.path, stem, png)
        self._written[index] = image.sha256
        if path.stem != stem:
            shown.say(f"{self.path / stem}.png is another picture and stays")
        print(path, flush=True)
