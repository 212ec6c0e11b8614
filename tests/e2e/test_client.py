"""The client and `dit generate` on the whole service: what the README says of them, done."""

import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from app.client import Client, DoneEvent, ImageEvent, PreviewEvent

README = Path(__file__).parents[2] / "README.md"


def example(language: str) -> str:
    """The block of this language in the section on the client."""
    section = README.read_text().split("## From Python and the shell\n")[1].split("\n## ")[0]
    (block,) = re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)
    return str(block)


def commands() -> list[list[str]]:
    """The words of each line of the block on the shell, after `dit`."""
    lines = [shlex.split(line, comments=True) for line in example("sh").splitlines()]
    assert all(program == ".venv/bin/dit" for program, *_ in lines)
    return [words for _, *words in lines]


def run(service: Any, folder: Path, *command: str) -> str:
    environment = {**service.environment, "DIT_URL": service.url, "PYTHONPATH": str(README.parent)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def told(path: Path) -> dict[str, Any]:
    with Image.open(path) as picture:
        return dict(json.loads(picture.text["dit"]))


def test_the_commands_of_the_readme_write_four_pictures_and_tell_what_makes_one_again(service: Any, tmp_path: Path) -> None:
    generate, show = commands()
    printed = run(service, tmp_path, sys.executable, "-m", "app.cli", *generate).splitlines()
    assert sorted(printed) == sorted(f"out/{name}" for name in os.listdir(tmp_path / "out")) and len(printed) == 4
    for line in printed:
        document = told(tmp_path / line)
        assert line == f"out/sneaker-{document['seed']}.png" and document["class_label"] == 2
    assert show == ["show", "out/sneaker-….png"]
    request = json.loads(run(service, tmp_path, sys.executable, "-m", "app.cli", "show", printed[3]))["request"]
    (again,) = service.pictures(service.submit(**request))
    with Image.open(tmp_path / printed[3]) as first, Image.open(io.BytesIO(again)) as second:
        assert first.tobytes() == second.tobytes()


def test_the_python_of_the_readme_writes_the_same_pictures_as_the_api(service: Any, tmp_path: Path) -> None:
    code = example("python").replace("http://127.0.0.1:8000", service.url)
    assert service.url in code
    run(service, tmp_path, sys.executable, "-c", code)
    assert sorted(told(path)["seed"] for path in tmp_path.glob("sneaker-*.png")) == [7, 8, 9, 10]
    assert (tmp_path / "sneaker-7.png").read_bytes() == service.pictures(service.submit(class_label="Sneaker", num_images=4, seed=7))[0]


def test_the_events_of_a_real_job_tell_its_pictures_and_what_they_look_like_on_their_way(service: Any) -> None:
    with Client(service.url) as client:
        job = client.generate(["Cat", None], steps=50, previews=True)
        events = list(client.events(job.id, timeout_s=240))
        pictures = {
            event.index: client.image(job.id, event.index, sha256=event.sha256) for event in events if isinstance(event, ImageEvent)
        }
        assert [pictures[i] for i in range(2)] == [client.image(job.id, i) for i in range(2)]
    assert events[-1] == DoneEvent(events[-1].id, "succeeded")
    assert any(isinstance(event, PreviewEvent) and event.image.startswith("data:image/png") for event in events)
