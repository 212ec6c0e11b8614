"""Names of classes as others write them: `id2label`, in which a class's synonyms are one string with commas."""

import json
from pathlib import Path
from typing import Any

from model.sources import ConversionError

Labels = dict[int, tuple[str, ...]]  # class index → every name it answers to


def read_labels(path: Path) -> Labels:
    """An `id2label`, a `model_index.json` that holds one, a JSON list, or a text with one class a line."""
    try:
        content = path.read_text("utf-8")
        document: Any = json.loads(content) if path.suffix == ".json" else content.strip().splitlines()
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{path} is no {'JSON' if path.suffix == '.json' else 'text'}: {error}") from error
    return parse_labels(path, document.get("id2label", document) if isinstance(document, dict) else document)


def parse_labels(path: Path, entries: Any) -> Labels:
    """`{"0": "tench, Tinca tinca"}` or `["tench, Tinca tinca"]` → `{0: ("tench", "Tinca tinca")}`; a blank name is no name."""
    if isinstance(entries, list):
        entries = dict(enumerate(entries))
    if not isinstance(entries, dict):
        raise ConversionError(f"{path}: class names are an object of index and name, or a list")
    labels: Labels = {}
    for index, names in entries.items():
        if not str(index).isdecimal() or len(str(index)) > 9 or not isinstance(names, str):
            raise ConversionError(f"{path}: {index!r}: {names!r} is no index and name of a class")
        group = tuple(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
        if group:
            labels[int(index)] = group
    return labels


def complete(labels: Labels, num_classes: int) -> tuple[tuple[str, ...], ...]:
    """One group of names per class; a class without any is `class 7`."""
    return tuple(labels.get(index, (f"class {index}",)) for index in range(num_classes))


def id2label(labels: tuple[tuple[str, ...], ...]) -> dict[str, str]:
    return {str(index): ", ".join(names) for index, names in enumerate(labels)}
