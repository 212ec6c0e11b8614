"""kill -9 of a worker whose pictures go into a folder, before Redis is told of them: nothing is lost, and in the end no file is left."""

import signal
from pathlib import Path

import pytest

from tests.chaos.service import Service
from tests.chaos.tiny import picture_request
from tests.chaos.worker import Mishap


@pytest.mark.parametrize(("point", "call"), [("written", 3), ("drawn", 1)])
def test_pictures_that_were_written_and_not_told_are_made_again_and_swept(service: Service, point: str, call: int) -> None:
    service.keep_pictures_in_a_folder()
    survivor = service.worker()
    survivor.signal(signal.SIGSTOP)  # until the other one has taken the job
    [job] = service.submit(picture_request(1, seed=30, num_images=10))
    victim = service.worker(Mishap(point, call))
    assert service.death(victim) == -signal.SIGKILL
    assert list(Path(service.image_store).rglob("*.png")) and not service.record(job).get("images")
    survivor.signal(signal.SIGCONT)
    service.lease_ends_soon(victim)
    service.runs_again(job)
    service.settle()
    assert service.ended[job].status == "succeeded" and service.ended[job].attempts == 2
