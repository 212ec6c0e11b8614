"""Whatever the API's own description lets be asked, and much that it does not: no 5xx, and no answer but those described.

`make fuzz` is the long form, with a report.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.fuzz.run import Outcome, asking_for_keys, fuzz, kept_going, served
from tests.e2e.service import Service

SHORT = ("--max-examples", "20", "--generation-deterministic")


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with served() as service:
        yield service


def check(outcome: Outcome) -> None:
    """Nothing was found, and not because nothing was tried."""
    assert outcome.passed, outcome.report
    assert outcome.cases > 500 and outcome.in_vain == set(), outcome.report


def test_nothing_breaks_the_description_of_an_open_service(service: Service, tmp_path: Path) -> None:
    with kept_going(service):
        check(fuzz(service.url, tmp_path, *SHORT))
    assert "Traceback" not in service.stderr


def test_nothing_breaks_the_description_of_a_service_with_keys(service: Service, tmp_path: Path) -> None:
    with kept_going(service), asking_for_keys(service, tmp_path) as (url, configuration):
        check(fuzz(url, tmp_path, *SHORT, configuration=configuration))
    assert "Traceback" not in service.stderr + (tmp_path / "api.log").read_text()
