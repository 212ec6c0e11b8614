"""What `dit generate` writes: a file per picture, named for its class and seed, and never over another picture."""

import re
from collections.abc import Sequence
from itertools import count
from pathlib import Path

_LONGEST_NAME = 60  # characters of a class name that go into a file's


def picture_stem(class_label: int | None, labels: Sequence[Sequence[str]], seed: int) -> str:
    """`ankle-boot-7` of the class named "Ankle boot"; the index stands for a class without a name that can be written."""
    if class_label is None:
        return f"unconditional-{seed}"
    names = labels[class_label] if class_label < len(labels) else ()
    slug = re.sub(r"\W+", "-", names[0].casefold() if names else "")[:_LONGEST_NAME].strip("-_")
    return f"{slug or f'class-{class_label}'}-{seed}"


def write_picture(folder: Path, stem: str, png: bytes) -> Path:
    """Write it under a name that is free: `stem.png`, `stem-2.png` …; a file with these very bytes counts as written."""
    for number in count(1):
        path = folder / (f"{stem}.png" if number == 1 else f"{stem}-{number}.png")
        try:
            with path.open("xb") as file:  # fails where there is a file, whoever else writes here
                try:
                    file.write(png)
                    file.flush()
                except BaseException:  # a full disk, Ctrl-C: half a picture is not left behind
                    path.unlink(missing_ok=True)
                    raise
            return path
        except FileExistsError:
            if path.is_file() and path.read_bytes() == png:
                return path
    raise AssertionError("numbers do not end")
