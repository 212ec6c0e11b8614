"""`dit generate`: what it writes, what it prints where, and how it ends."""

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from app.cli import app
from app.client import Client
from app.drawing import class_label
from app.picture_files import picture_stem, write_picture

Paint = Callable[..., dict[str, Any]]
Dit = Callable[..., Result]


def png(seed: int) -> bytes:
    """What `paint` paints."""
    return b"\x89PNG\r\n\x1a\n of seed %d" % seed


@pytest.fixture
def dit(url: str, tmp_path: Path) -> Dit:
    """`dit(*arguments)`: the command in this process, its pictures in `tmp_path/out`."""

    def run(*arguments: object, **environment: str) -> Result:
        words = ["generate", *map(str, arguments)]
        return CliRunner().invoke(app, words, env={"DIT_URL": url, "DIT_API_KEY": None, **environment})

    return run


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def draws(worker: Any, paint: Paint) -> Callable[..., AbstractContextManager[None]]:
    """`with draws(*seeds)`: a worker that makes these pictures of the next job, in that order."""

    def work(*seeds: int) -> AbstractContextManager[None]:
        def finish(worker: Any, job_id: str) -> None:
            worker.tell(job_id, "progress", {"step": 2, "steps": 4}, step=2)
            entries = [paint(job_id, index, seed) for index, seed in enumerate(seeds)]
            assert worker.results.succeed(job_id, "execution-1", entries)

        return worker.meanwhile(finish)

    return work


def one_line(result: Result, code: int = 1) -> str:
    """What an error says, last and in one line."""
    assert (result.exit_code, result.stdout) == (code, ""), result.output
    line = result.stderr.splitlines()[-1]
    assert line.startswith("dit: ") and "Traceback" not in result.stderr
    return line


# --- pictures ----------------------------------------------------------------------------------------------------------


def test_each_picture_is_written_under_its_class_and_seed_and_its_path_printed(dit: Dit, out: Path, draws: Any) -> None:
    with draws(7, 8):
        result = dit("House Cat", "-n", 2, "--seed", 7, "-o", out / "new")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [str(out / "new" / "cat-7.png"), str(out / "new" / "cat-8.png")]
    assert {path.name: path.read_bytes() for path in (out / "new").iterdir()} == {"cat-7.png": png(7), "cat-8.png": png(8)}
    assert result.stderr.splitlines()[1:] == ["step 0 of 4", "step 2 of 4", "step 4 of 4"]


def test_several_classes_make_one_picture_each(dit: Dit, out: Path, draws: Any) -> None:
    with draws(7, 8, 9):
        result = dit("dog", "-", "3", "--seed", 7, "-o", out)
    assert [Path(line).name for line in result.stdout.splitlines()] == ["dog-7.png", "unconditional-8.png", "truck-9.png"]


def test_every_option_reaches_the_server(dit: Dit, out: Path, draws: Any, url: str, redis: Any) -> None:
    with draws(3):
        options = {"--guidance-scale": 1.5, "--sampler": "euler", "--seed": 3, "--model": "tiny", "--num-images": 1, "--quality": "best"}
        result = dit("--unconditional", *(word for pair in options.items() for word in pair), "--out", out)
    assert result.stdout == f"{out / 'unconditional-3.png'}\n"
    (key,) = redis.keys("dit:job:*[0-9a-f]")
    with Client(url) as client:
        request = client.job(key.decode().split(":")[-1]).request
    expected = {"class_label": None, "guidance_scale": 1.5, "sampler": "euler", "seed": 3, "model": "tiny", "num_images": 1, "steps": 50}
    assert {name: request[name] for name in expected} == expected


def test_a_picture_is_written_while_the_next_one_is_made(dit: Dit, out: Path, worker: Any, paint: Paint) -> None:
    def finish(worker: Any, job_id: str) -> None:
        first = paint(job_id, 0, 7)
        deadline = time.monotonic() + 30
        while not (out / "cat-7.png").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (out / "cat-7.png").exists()
        assert worker.results.succeed(job_id, "execution-1", [first, paint(job_id, 1, 8)])

    with worker.meanwhile(finish):
        assert dit("cat", "-n", 2, "-o", out).exit_code == 0
    assert sorted(path.name for path in out.iterdir()) == ["cat-7.png", "cat-8.png"]


def test_another_picture_of_that_name_stays_and_the_same_is_not_written_twice(dit: Dit, out: Path, draws: Any) -> None:
    out.mkdir()
    (out / "cat-7.png").write_bytes(b"of another model")
    for _ in range(2):
        with draws(7):
            result = dit("cat", "--seed", 7, "-o", out)
        assert result.stdout == f"{out / 'cat-7-2.png'}\n" and f"{out / 'cat-7.png'} is another picture and stays" in result.stderr
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {"cat-7.png": b"of another model", "cat-7-2.png": png(7)}


def test_a_picture_that_went_with_its_worker_is_fetched_when_it_comes_again(dit: Dit, out: Path, worker: Any, paint: Paint) -> None:
    def finish(worker: Any, job_id: str) -> None:
        entry = paint(job_id, 0, 7)
        worker.redis.delete(f"dit:image:{job_id}:execution-1:0")
        assert worker.results.give_back(job_id, "execution-1") and worker.take(job_id)
        assert worker.results.succeed(job_id, "execution-1", [paint(job_id, 0, 7)]) and entry["seed"] == 7

    with worker.meanwhile(finish):
        result = dit("cat", "-o", out)
    assert (result.exit_code, result.stdout) == (0, f"{out / 'cat-7.png'}\n"), result.output
    assert "it starts again" in result.stderr and (out / "cat-7.png").read_bytes() == png(7)


@pytest.mark.parametrize(
    ("label", "names", "stem"),
    [
        (0, ["Ankle boot"], "ankle-boot-7"),
        (0, ["T-shirt/top", "other"], "t-shirt-top-7"),
        (0, ["../../etc/passwd"], "etc-passwd-7"),
        (0, [".hidden\0\n"], "hidden-7"),
        (0, ["Éclair au café"], "éclair-au-café-7"),
        (0, ["?!"], "class-0-7"),
        (0, [], "class-0-7"),
        (5, ["cat"], "class-5-7"),
        (None, ["cat"], "unconditional-7"),
        (0, ["x" * 300], "x" * 60 + "-7"),
    ],
)
def test_a_class_becomes_a_name_that_a_file_can_have(label: int | None, names: list[str], stem: str, tmp_path: Path) -> None:
    assert picture_stem(label, [names], 7) == stem
    assert write_picture(tmp_path, stem, b"a") == tmp_path / f"{stem}.png"


def test_words_are_indices_names_or_the_unconditional_picture() -> None:
    assert [class_label([word]) for word in ("3", "03", "Sneaker", "-", "3.5", "²", "9" * 30)] == [
        3,
        3,
        "Sneaker",
        None,
        "3.5",
        "²",
        "9" * 30,
    ]
    assert class_label(["3", "-", "Dog"]) == [3, None, "Dog"]


# --- errors ------------------------------------------------------------------------------------------------------------


def test_a_class_that_there_is_not_is_one_line_with_suggestions(dit: Dit, out: Path) -> None:
    assert "did you mean truck?" in one_line(dit("truk", "-o", out))
    assert "num_images: goes with one class_label" in one_line(dit("cat", "dog", "-n", 2, "-o", out))
    assert "guidance_scale: must be less than or equal to 20" in one_line(dit("cat", "--guidance-scale", 21, "-o", out))
    assert "JSON" in one_line(dit("cat", "--guidance-scale", "nan", "-o", out))


def test_a_server_that_is_not_there_is_told_at_once(dit: Dit, out: Path, wire: Any) -> None:
    wire.close()
    began = time.monotonic()
    assert one_line(dit("cat", "-o", out, "--url", wire.url)).startswith(f"dit: {wire.url} does not answer: ")
    assert time.monotonic() - began < 20  # patience would take a minute
    assert "begins with http:// or https://" in one_line(dit("cat", "-o", out, "--url", "localhost:8000"))


def test_a_folder_that_cannot_be_made_costs_the_server_nothing(dit: Dit, out: Path, redis: Any) -> None:
    out.write_text("a file")
    assert "File exists" in one_line(dit("cat", "-o", out))
    assert redis.llen("rq:queue:dit-tiny") == 0


def test_a_class_or_none_must_be_asked_for(dit: Dit) -> None:
    assert one_line(dit(), 2) == one_line(dit("cat", "--unconditional"), 2) == "dit: name a class, or say --unconditional"


def test_a_failed_job_says_why(dit: Dit, out: Path, worker: Any) -> None:
    with worker.meanwhile(lambda worker, job_id: worker.fail(job_id, "no luck")):
        assert one_line(dit("cat", "-o", out)).endswith("failed: no luck")


def test_a_job_that_another_has_canceled_is_told(dit: Dit, out: Path, worker: Any, url: str) -> None:
    def cancel(worker: Any, job_id: str) -> None:
        with Client(url) as client:
            client.cancel(job_id)
        assert worker.results.cancel(job_id, "execution-1")

    with worker.meanwhile(cancel):
        assert one_line(dit("cat", "-o", out)).endswith(" canceled")


def test_a_damaged_picture_is_not_written(dit: Dit, out: Path, worker: Any) -> None:
    with worker.meanwhile(lambda worker, job_id: worker.succeed(job_id)):  # its sha256 is of noughts
        assert "came damaged" in one_line(dit("cat", "-o", out))
    assert list(out.iterdir()) == []


def test_a_job_that_takes_too_long_is_canceled(dit: Dit, out: Path, redis: Any) -> None:
    line = one_line(dit("cat", "-o", out, "--timeout", 0.3))
    assert "has not ended within 0.3 s; job" in line and line.endswith("is canceled")
    assert redis.llen("rq:queue:dit-tiny") == 0


def test_a_server_that_is_busy_is_waited_for_and_that_is_told(
    record: Any, listen: Any, dit: Dit, out: Path, worker: Any, draws: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with listen(queue_limit=1) as url, Client(url) as client, ExitStack() as stack:
        first = client.generate(0).id

        def pause(seconds: float) -> None:
            worker.take(first)
            stack.enter_context(draws(7))

        monkeypatch.setattr("app.transport.sleep", pause)
        result = dit("cat", "-o", out, "--url", url)
    assert "1 jobs wait already, and 1 may; try again later; trying again in 10 s" in result.stderr.splitlines()
    assert (result.exit_code, result.stdout) == (0, f"{out / 'cat-7.png'}\n")


def test_key_and_server_come_from_the_environment(dit: Dit, out: Path, draws: Any, wire: Any) -> None:
    with draws(7):
        assert dit("cat", "-o", out, DIT_URL=wire.url, DIT_API_KEY="dit_secret").exit_code == 0
    requests = [said for said in wire.said if said.startswith((b"GET ", b"POST "))]
    assert len(requests) >= 4 and all(b"Bearer dit_secret" in said for said in requests)


# --- on a terminal -----------------------------------------------------------------------------------------------------


@contextmanager
def started(url: str, out: Path, *words: str, stderr: int) -> Iterator[subprocess.Popen[str]]:
    """The command in a process of its own."""
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen(
        [sys.executable, "-m", "app.cli", "generate", *words, "--url", url, "-o", str(out)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream:
                stream.close()


def test_ctrl_c_cancels_the_job_and_says_so(url: str, out: Path, worker: Any, paint: Paint) -> None:
    with started(url, out, "cat", "-n", "2", stderr=subprocess.PIPE) as process:
        job_id = worker.take()
        paint(job_id, 0, 7)
        assert process.stdout and process.stdout.readline() == f"{out / 'cat-7.png'}\n"
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate(timeout=60)
    assert (process.returncode, rest) == (130, "") and (out / "cat-7.png").read_bytes() == png(7)
    assert err.splitlines()[-1] == f"dit: stopped; job {job_id} stops at its next step"
    assert worker.tell(job_id, "progress", {}) == "cancel"


def test_on_a_terminal_a_bar_shows_the_steps_and_stdout_has_the_paths_alone(url: str, out: Path, draws: Any) -> None:
    ours, theirs = pty.openpty()
    with draws(7), started(url, out, "cat", stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        while chunk := _read(ours):
            shown += chunk
        assert process.stdout and process.stdout.read() == f"{out / 'cat-7.png'}\n" and process.wait(60) == 0
    os.close(ours)
    assert b"4/4" in shown and "━".encode() in shown and b"cat-7.png" not in shown


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # nobody writes there any more
        return b""
