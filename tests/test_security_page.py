"""docs/security.md: every claim names tests, and every test that it names is there."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "security.md"
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")


def claims() -> list[tuple[str, str]]:
    """The rows of the table of claims: what is said, and what is named for it."""
    section = PAGE.read_text().split("\n## Claims")[1].split("\n## ")[0]
    rows = [line.strip().strip("|").split(" | ") for line in section.splitlines() if line.startswith("|")]
    return [(claim.strip(), tests) for claim, tests in rows[2:]]


@cache
def defined_in(path: str) -> set[str]:
    """Names of the functions at the top of a file of tests."""
    tree = ast.parse((ROOT / path).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_there_are_claims() -> None:
    assert len(claims()) > 30 and len({claim for claim, _ in claims()}) == len(claims())


@pytest.mark.parametrize(("claim", "named"), claims(), ids=[claim[:60] for claim, _ in claims()])
def test_a_claim_has_its_test(claim: str, named: str) -> None:
    found = NAMED.findall(named)
    assert found and NAMED.sub("", named).strip() == "", "every name is one of a test"
    for path, name in found:
        assert name in defined_in(path), f"{path} has no {name}"


def test_no_other_place_of_the_page_names_a_test_that_there_is_not() -> None:
    assert all(name in defined_in(path) for path, name in NAMED.findall(PAGE.read_text()))
