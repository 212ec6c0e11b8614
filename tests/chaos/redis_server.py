"""A real redis-server on a unix socket, with an append-only file in a folder; it can be killed and started again on the same data."""

import resource
import shutil
import subprocess
import time
from pathlib import Path

from redis import Redis
from redis.exceptions import RedisError

START_TIMEOUT_S = 60.0
MISSING = "redis-server is not installed: apt-get install redis-server (version 7 or newer)"


class RedisServer:
    """Its data stay in `folder`, whose path must be short: a socket's holds about 100 bytes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.socket = folder, folder / "redis.sock"
        self.url = f"unix://{self.socket}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, or start it again; returns when it answers."""
        program = shutil.which("redis-server")
        if program is None:
            raise FileNotFoundError(MISSING)
        self.folder.mkdir(exist_ok=True)
        options = {
            "--port": "0",
            "--unixsocket": str(self.socket),
            "--dir": str(self.folder),
            "--appendonly": "yes",
            "--save": "",
            "--maxmemory-policy": "noeviction",
            "--logfile": str(self.folder / "redis.log"),
        }
        # Python ignores SIGXFSZ, and so shall the server: a write beyond the limit of `limit_files` then fails as on a full disk.
        self.process = subprocess.Popen([program, *(part for option in options.items() for part in option)], restore_signals=False)
        self._wait_until_it_answers()

    def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        with Redis.from_url(self.url, protocol=2) as client:
            while True:
                try:
                    client.ping()
                    return
                except (RedisError, OSError):
                    assert time.monotonic() < deadline, f"redis-server did not start; see {self.folder / 'redis.log'}"
                    time.sleep(0.02)

    def kill(self) -> None:
        """SIGKILL; what it has written to its file stays."""
        if self.process:
            self.process.kill()
            self.process.wait()

    def fill_disk(self) -> None:
        """From now on no file of the server can grow: a write fails, as it does where no space is left."""
        assert self.process
        largest = max(path.stat().st_size for path in self.folder.rglob("*.aof"))
        resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))

    def free_disk(self) -> None:
        assert self.process
        resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
