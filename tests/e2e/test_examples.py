"""Every example of docs/api.md and of the README is done as it stands there, on the bundled checkpoint."""

import io
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from app.cli import app
from app.examples import CHECKPOINT
from tests.e2e.examples import ADDRESS, ROOT, blocks, commands
from tests.e2e.service import Service

# A call that is answered with an error ends the script.
SHELL = 'set -euo pipefail\ncurl() { command curl --fail-with-body "$@" && echo; }\n'
PAGES = [
    "README.md",
    *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").glob("*.md"))),
    "checkpoints/fashion-mnist/README.md",
]


def shell(service: Service, folder: Path, script: str) -> str:
    """What it prints."""
    script, places = ADDRESS.subn(service.url, script)
    assert places, "it names no server"
    environment = {**os.environ, "DIT_API_KEY": "dit_none", "no_proxy": "127.0.0.1"}
    done = subprocess.run(["bash", "-c", SHELL + script], cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def python(service: Service, folder: Path, code: str) -> str:
    code, places = ADDRESS.subn(service.url, code)
    assert places, "it names no server"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def request_of(png: bytes) -> dict[str, Any]:
    """What the picture tells of itself."""
    with Image.open(io.BytesIO(png)) as picture:
        return dict(json.loads(picture.text["dit"]))


# --- docs/api.md -------------------------------------------------------------------------------------------------------


def test_every_command_of_the_api_page_is_answered(bundled: Service, tmp_path: Path) -> None:
    """In order, in one shell, as somebody types them who reads it from top to bottom."""
    said = shell(bundled, tmp_path, "".join(blocks("docs/api.md", "sh")))
    documents = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert {"models", "jobs", "queues", "status"} <= {name for document in documents for name in document}
    assert [document["state"] for document in documents if "state" in document] == ["paused", "draining", "open"]
    assert said.count("event: done") >= 1 and "dit_http_requests_total" in said
    assert request_of((tmp_path / "sneaker.png").read_bytes())["seed"] == 7
    assert request_of((tmp_path / "picture.png").read_bytes())["class_label"] == 7
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.format == "PNG"
    jobs = bundled.client.get("/jobs", params={"limit": 100}).json()["jobs"]
    assert len([job for job in jobs if job["request"].get("num_images") == 4]) == 1, "asked twice, made once"
    (long,) = [job for job in jobs if job["request"].get("num_images") == 64]
    assert bundled.end_of(long["id"])["status"] == "canceled"


def test_the_python_of_the_api_page_tells_steps_pictures_and_what_is_wrong(bundled: Service, tmp_path: Path) -> None:
    (code,) = blocks("docs/api.md", "python")
    said = python(bundled, tmp_path, code)
    assert "step 0 of 13\n" in said and "\npicture 0: " in said and "\npicture 1: " in said
    assert said.splitlines()[-1].startswith("422 class_label: ") and "did you mean Sneaker?" in said


# --- README ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", ["README.md", "checkpoints/fashion-mnist/README.md"])
def test_the_curl_of_a_readme_writes_the_picture_of_a_job(bundled: Service, tmp_path: Path, page: str) -> None:
    (block,) = [block for block in blocks(page, "sh") if "/generate" in block]
    shell(bundled, tmp_path, block[block.index("curl ") :])
    (path,) = tmp_path.glob("*.png")
    (job,) = bundled.client.get("/jobs", params={"limit": 1}).json()["jobs"]
    assert path.read_bytes() == bundled.pictures(job["id"])[0]
    assert request_of(path.read_bytes())["seed"] == job["request"]["seed"] == 7


RECIPE = """
[data]
image_size = 16
image_channels = 1
labels = ["cat", "dog", "ship", "truck"]

[vae]
latent_channels = 4
block_out_channels = [8, 16]
layers_per_block = 1
norm_num_groups = 4
mid_block_attention = false
kl_weight = 1e-3
optimiser = {steps = 4, batch_size = 8, learning_rate = 1e-3, final_learning_rate = 1e-4, warmup_steps = 1}

[dit]
patch_size = 2
hidden_size = 32
depth = 2
num_heads = 2
objective = "diffusion"
learn_sigma = true
optimiser = {steps = 4, batch_size = 8, learning_rate = 1e-3, final_learning_rate = 1e-4, warmup_steps = 1}

[defaults]
steps = 4
guidance_scale = 2.0
sampler = "ddim"
"""
ELSEWHERE = {  # of the README's commands: those that are not run here, and why
    "up": "tests/e2e/test_up_model.py serves a folder; the README's comes from a hub",
    "import": "tests/app/test_cli_convert.py imports a file; the README's has 2.7 GB",
    "generate": "tests/e2e/test_client.py",
    "show": "tests/e2e/test_client.py",
    "tune": "tests/training/test_tune.py, with fewer pictures",
    "evaluate": "tests/training/test_evaluate.py, with fewer pictures",
}


def test_the_commands_of_the_readme_train_publish_and_keep_a_model(
    bundled: Service, tmp_path: Path, make_idx_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-recipe.toml").write_text(RECIPE)
    make_idx_folder(tmp_path / "images")

    def dit(*words: str) -> str:
        result = CliRunner().invoke(app, words, env={"DIT_DATA": bundled.environment["DIT_DATA"], "DIT_CHECKPOINTS": "checkpoints"})
        assert result.exit_code == 0, f"dit {' '.join(words)}: {result.output}"
        return result.output

    dit("models", "publish", str(ROOT / "checkpoints" / "fashion-mnist"), "my-model")  # so that there is a version to go back to
    said = {tuple(words[:2]): dit(*words) for words in commands("README.md", "dit") if words[0] not in ELSEWHERE}
    assert set(said) >= {("train", "vae"), ("train", "dit"), ("export", "checkpoints/my-model"), ("models", "rollback"), ("jobs", "dead")}
    assert "my-model" in said["models",] and (tmp_path / "my-pipeline" / "model_index.json").is_file()
    assert CHECKPOINT[:12] in said["models", "rollback"] and said["models", "prune"] and said["cost",]


def test_the_make_targets_of_the_readme_are_there() -> None:
    for words in commands("README.md", "make"):
        done = subprocess.run(["make", "--dry-run", *words], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and done.stdout, done.stderr


def test_every_dit_command_that_is_told_of_is_one_that_dit_takes() -> None:
    """Also where to run it takes a GPU, a hub or an hour. A name in capitals stands for one of the reader's."""
    told = [(page, words) for page in PAGES for words in _commands_of(page)]
    assert {page for page, _ in told} >= {"README.md", "docs/observability.md"} and len(told) > 20
    for page, words in told:
        try:
            _parse(typer.main.get_command(app), words)
        except Exception as error:
            raise AssertionError(f"{page}: dit {' '.join(words)}: {error}") from error


def _commands_of(page: str) -> list[list[str]]:
    """Each until the shell has its say."""
    told = commands(page, "dit") if "```sh" in (ROOT / page).read_text() else []
    return [list(itertools.takewhile(lambda word: word not in ("|", "2>&1", "&&"), words)) for words in told]


def _parse(command: Any, words: list[str]) -> None:
    """As the command line does, without doing it."""
    context = command.make_context("dit", list(words))
    rest = [*context._protected_args, *context.args]
    if rest and hasattr(command, "resolve_command"):
        _, inner, rest = command.resolve_command(context, rest)
        _parse(inner, rest)
