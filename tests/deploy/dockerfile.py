"""The Dockerfile, stage by stage."""

import json
import re
from dataclasses import dataclass, field

from tests.deploy.compose import ROOT


@dataclass
class Stage:
    """What is between two FROMs."""

    name: str
    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)  # instruction, the rest of its line

    def all(self, instruction: str) -> list[str]:
        return [rest for word, rest in self.steps if word == instruction]

    def copies(self) -> list[tuple[str | None, list[str]]]:
        """For each COPY the stage it takes from, if any, and its sources."""
        found = []
        for rest in self.all("COPY"):
            options = dict(re.findall(r"--(\w+)=(\S+)", rest))
            found.append((options.get("from"), [word for word in rest.split() if not word.startswith("--")][:-1]))
        return found


def stages() -> dict[str, Stage]:
    """By name, in their order."""
    found: dict[str, Stage] = {}
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.M)
    for line in re.sub(r"\\\n", " ", text).splitlines():
        if not line.strip():
            continue
        word, rest = line.strip().split(maxsplit=1)
        if word == "FROM":
            base, _, name = rest.split()
            stage = found[name] = Stage(name, base)
        else:
            stage.steps.append((word, rest))
    return found


def environment(name: str) -> dict[str, str]:
    """What the image sets, its bases' variables too."""
    stage = stages()[name]
    inherited = environment(stage.base) if stage.base in stages() else {}
    return {**inherited, **{key: value for rest in stage.all("ENV") for key, value in re.findall(r"(\w+)=(\S+)", rest)}}


def command(name: str) -> list[str]:
    """What a container of the image runs."""
    return list(json.loads(stages()[name].all("CMD")[-1]))
