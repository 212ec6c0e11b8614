"""The images, as far as they can be looked at without an engine."""

import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.deploy.compose import ROOT
from tests.deploy.dockerfile import command, environment, stages

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TARGETS = ("api", "worker")


def needed(requirements: list[str]) -> set[str]:
    """The distributions that pip installs for these, as far as this machine is like the image."""
    found: set[str] = set()
    left = [Requirement(text) for text in requirements]
    while left:
        requirement = left.pop()
        name = canonicalize_name(requirement.name)
        if name not in found:
            found.add(name)
            for text in requires(name) or []:
                inner = Requirement(text)
                if inner.marker is None or any(inner.marker.evaluate({"extra": extra}) for extra in ("", *requirement.extras)):
                    left.append(inner)
    return found


def test_there_is_an_image_of_the_api_and_one_of_the_worker() -> None:
    assert list(stages())[-2:] == list(TARGETS)


def test_base_images_are_pinned_to_a_patch_version() -> None:
    bases = {stage.base for stage in stages().values()} - set(stages())
    assert bases and all(re.fullmatch(r"[\w/]+:\d+\.\d+\.\d+-[\w-]+", base) for base in bases), bases


@pytest.mark.parametrize("target", TARGETS)
def test_nobody_in_them_is_root(target: str) -> None:
    user = stages()[target].all("USER")[-1]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user), "a number, so that Kubernetes' runAsNonRoot can see it"
    assert f"--uid {user.partition(':')[0]} " in " ".join(stages()["python"].all("RUN"))


def ignored(path: str) -> bool:
    """By .dockerignore, whose last pattern that fits decides."""
    verdict = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.strip()
        if pattern and not pattern.startswith("#"):
            wanted = pattern.lstrip("!").removeprefix("**/")
            if fnmatch(path.split("/")[0], wanted) or fnmatch(path, wanted) or fnmatch(path.split("/")[-1], wanted):
                verdict = not pattern.startswith("!")
    return verdict


def test_what_is_copied_is_there_and_nothing_else_can_be() -> None:
    for stage in stages().values():
        for source, paths in stage.copies():
            if source is not None:
                assert source in stages() and paths == ["/opt/dit"], "only packages go from stage to stage"
                continue
            for path in paths:
                assert (ROOT / path).exists() and (path == "." or not ignored(path.rstrip("/"))), path
    for path in (
        "secrets/redis-password",
        ".env",
        "dit.env",
        ".git/config",
        ".venv/bin/python",
        "app/__pycache__/cli.pyc",
        "tests/conftest.py",
    ):
        assert ignored(path), path
    for package in PROJECT["tool"]["setuptools"]["packages"]:
        assert not ignored(f"{package.replace('.', '/')}/__init__.py")


def test_packages_come_before_the_source() -> None:
    for target in TARGETS:
        words = [f"{word} {rest}" for word, rest in stages()[f"{target}-packages"].steps]
        installs = [number for number, step in enumerate(words) if "--constraint constraints.txt" in step]
        assert installs and max(installs) < words.index("COPY . ."), "a change of source would install everything anew"
        assert "--no-deps" in words[-1]
    folders = re.search(r"mkdir -p (.+)$", stages()["python"].all("RUN")[-1])
    made = {str(folder) for path in folders[1].split() for folder in (Path(path), *Path(path).parents)} if folders else set()
    assert made == {".", *(package.replace(".", "/") for package in PROJECT["tool"]["setuptools"]["packages"])}


def test_no_secret_is_in_them() -> None:
    for stage in stages().values():
        for rest in (*stage.all("ENV"), *stage.all("ARG")):
            assert not re.search(r"PASSWORD|SECRET|TOKEN|KEY", rest), rest


@pytest.mark.parametrize("target", TARGETS)
def test_their_commands_are_ours(target: str) -> None:
    assert command(target) == ["dit", target] and "dit" in PROJECT["project"]["scripts"]
    help_text = subprocess.run([sys.executable, "-m", "app.cli", target, "--help"], capture_output=True, text=True, timeout=120)
    assert help_text.returncode == 0, help_text.stderr
    assert environment(target)["PATH"].startswith("/opt/dit/bin:")


def test_the_worker_has_a_compiler_and_the_pinned_torch() -> None:
    assert any("install" in run and "g++" in run for run in stages()["worker"].all("RUN"))
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert f"torch=={pins['torch']}" in PROJECT["project"]["optional-dependencies"]["worker"]
    assert any(run.endswith("--constraint constraints.txt torch") for run in stages()["worker-packages"].all("RUN"))


def test_both_can_read_and_write_s3() -> None:
    for target, extras in (("api", "s3"), ("worker", "training,s3")):
        assert any(f"'.[{extras}]'" in run for run in stages()[f"{target}-packages"].all("RUN"))


# Without torch, and S3 where it is wanted, as in the API's image. Here, every other module is made to look as if it were not installed.
ALONE = """
import sys
from importlib.metadata import packages_distributions
from packaging.utils import canonicalize_name

needed, ours = set(sys.argv[1].split(",")), {"app", "worker", "model", "training"}
absent = {
    module for module, owners in packages_distributions().items() if not {canonicalize_name(owner) for owner in owners} & needed
} - ours

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

for module in [module for module in sys.modules if module.partition(".")[0] in absent]:
    del sys.modules[module]
sys.meta_path.insert(0, Absent())

import app.cli, app.health, app.local, worker.pulse
if sys.argv[2:]:
    import worker.stores.s3
from app.main import create_app
from app.settings import Settings

assert "torch" in absent and "torch" not in sys.modules
create_app(Settings(_env_file=None, redis_url="redis://nowhere")).openapi()
"""


@pytest.mark.parametrize("extras", [[], ["s3"]])
def test_the_api_runs_with_the_packages_of_its_image_and_torch_is_not_among_them(extras: list[str]) -> None:
    inner = [name for extra in extras for name in PROJECT["project"]["optional-dependencies"][extra]]
    alone = needed(PROJECT["project"]["dependencies"] + inner)
    assert not alone & {"torch", "numpy", "diffusers", "safetensors", "triton"}
    done = subprocess.run(
        [sys.executable, "-c", ALONE, ",".join(sorted(alone)), *extras], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
