"""Services over one tiny model, and the undisturbed one whose pictures are what all others must give."""

import itertools
import tempfile
import threading
from pathlib import Path

from tests.chaos.service import Service
from tests.chaos.tiny import save_tiny
from worker.protocol import SUCCEEDED, GenerationRequest


class Services:
    """A context manager; at its end nobody waits any more. For many threads."""

    def __enter__(self) -> "Services":
        self._folder = tempfile.TemporaryDirectory(prefix="dit-chaos-")  # pytest's own paths are too long for a socket
        self._registry = Path(self._folder.name) / "registry"
        self._checkpoint = save_tiny(self._registry)
        self._numbers, self._tests_end = itertools.count(), threading.Event()
        self._one_asks, self._known = threading.Lock(), dict[GenerationRequest, list[bytes]]()
        self._undisturbed = self.open()
        return self

    def open(self) -> Service:
        """One more, which its own `with` starts."""
        folder = Path(self._folder.name) / str(next(self._numbers))
        return Service(folder, self._registry, self._checkpoint, self.pictures, self._tests_end)

    def pictures(self, request: GenerationRequest) -> list[bytes]:
        """The PNGs that a request gives when nothing happens: one worker makes them, one job at a time."""
        with self._one_asks:
            if not self._undisturbed.workers:
                self._undisturbed.server.start()
                self._undisturbed.worker()
            if request not in self._known:
                (job_id,) = self._undisturbed.submit(request)
                self._undisturbed.settle()
                ended = self._undisturbed.ended[job_id]
                assert (ended.status, ended.attempts) == (SUCCEEDED, 1), ended.record
                self._known[request] = ended.pictures
            return self._known[request]

    def rest(self) -> None:
        """No picture will be asked for any more."""
        self._undisturbed.close()

    def __exit__(self, *_: object) -> None:
        self._tests_end.set()
        self.rest()
        self._folder.cleanup()
