"""What a page of Markdown tells a reader to type."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
ADDRESS = re.compile(r"(http://127\.0\.0\.1|localhost):8000")  # of `make run`


def blocks(page: str, language: str) -> list[str]:
    """Every block of this language, in order."""
    found = re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    assert found, f"{page} has no {language}"
    return found


def commands(page: str, program: str) -> list[list[str]]:
    """The words after `program` of every line that begins with it."""
    lines = [shlex.split(line, comments=True) for block in blocks(page, "sh") for line in block.replace("\\\n", " ").splitlines()]
    return [words[1:] for words in lines if words and Path(words[0]).name == program]
