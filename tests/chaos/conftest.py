"""What happens to a service, with real processes and a real Redis; service.py says what is asserted at the end of every scenario.

Most of its time a scenario waits for a lease or a key to expire. So all that were selected begin at once, in threads, each with a service
of its own, and each test waits for the end of its scenario.
"""

import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.chaos.redis_server import MISSING
from tests.chaos.services import Services

HERE = Path(__file__).parent


def play(services: Services, item: pytest.Function) -> None:
    """The scenario of one test."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    with services.open() as service:
        item.function(service, **parameters)


@pytest.fixture(scope="session")
def begun(request: pytest.FixtureRequest) -> Iterator[dict[str, "Future[None]"]]:
    """The scenarios of all tests of this folder that were selected, under way."""
    if shutil.which("redis-server") is None:
        pytest.fail(MISSING, pytrace=False)
    items = [item for item in request.session.items if isinstance(item, pytest.Function) and HERE in item.path.parents]
    with ThreadPoolExecutor(len(items), thread_name_prefix="scenario") as pool, Services() as services:
        scenarios = {item.nodeid: pool.submit(play, services, item) for item in items}
        for scenario in scenarios.values():  # tests of other folders may follow
            scenario.add_done_callback(lambda _: services.rest() if all(other.done() for other in scenarios.values()) else None)
        yield scenarios


@pytest.fixture
def service(begun: dict[str, "Future[None]"]) -> None:
    """A service of the scenario's own. `play` gives it, in the thread in which the scenario runs."""


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool:
    """The call of a test is the wait for its scenario."""
    pyfuncitem.funcargs["begun"][pyfuncitem.nodeid].result()
    return True
