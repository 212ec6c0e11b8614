"""Our compose files as Docker reads them: several on top of each other, `!reset`, variables; and what a service says, as a process."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CPU = ("docker-compose.yml", "compose.cpu.yml")
_REPLACED = ("command", "entrypoint", "test")  # lists that take the place of the ones before; all others are appended to them
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


class _Reset:
    """What `!reset` takes away."""


class _Loader(yaml.SafeLoader):
    """YAML with Docker's tag."""


_Loader.add_constructor("!reset", lambda loader, node: _Reset())


def load(*names: str, variables: Mapping[str, str] | None = None) -> dict[str, Any]:
    """These files of the repository, the later ones on top."""
    merged: Any = {}
    for name in names:
        merged = _merge(merged, yaml.load((ROOT / name).read_text(), _Loader))  # which is a SafeLoader
    return _filled_in(merged, variables or {})


def _merge(under: Any, over: Any, name: str = "") -> Any:
    if isinstance(under, dict) and isinstance(over, dict):
        merged = {**under, **{key: _merge(under[key], value, key) if key in under else value for key, value in over.items()}}
        return {key: value for key, value in merged.items() if not isinstance(value, _Reset)}
    if isinstance(under, list) and isinstance(over, list) and name not in _REPLACED:
        return under + over
    return over


def _filled_in(value: Any, variables: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _filled_in(item, variables) for key, item in value.items()}
    if isinstance(value, list):
        return [_filled_in(item, variables) for item in value]
    if not isinstance(value, str):
        return value

    def fill(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        name, default = match["name"], match["default"]
        if name is None or (name not in variables and default is None):
            raise ValueError(f"{value!r}: no value for {match[0]}")
        return variables.get(name) or default

    return re.sub(r"\$\$|\$(?:\{(?P<name>\w+)(?::-(?P<default>[^}]*))?\})?", fill, value)


def seconds(duration: str) -> float:
    """ "1m30s" → 90."""
    parts = re.findall(r"(\d+(?:\.\d+)?)(ms|s|m|h)", duration)
    assert "".join(f"{number}{unit}" for number, unit in parts) == duration, duration
    return sum(float(number) * _UNITS[unit] for number, unit in parts)


def check_command(service: Mapping[str, Any]) -> list[str]:
    """What its health check runs."""
    kind, *command = service["healthcheck"]["test"]
    return command if kind == "CMD" else ["/bin/sh", "-c", *command]


def mounts(service: Mapping[str, Any]) -> dict[str, str]:
    """Where in the container → which volume, or which folder of the host."""
    return {entry.split(":")[1]: entry.split(":")[0] for entry in service.get("volumes", [])}
