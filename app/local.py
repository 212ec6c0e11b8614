"""`dit up`: embedded server, worker and API on one machine, as children that are restarted when they die and stopped in order.

Each child has a process group of its own, so that Ctrl-C reaches only the supervisor, and all stay in one session. A child that finds its
supervisor gone ends by itself.
"""

import contextlib
import fcntl
import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

from redis import Redis
from redis.exceptions import RedisError

from app.embedded import EmbeddedServer
from app.imports import checkpoint_folder
from app.settings import Settings, load_settings
from worker import protocol
from worker.connect import connect
from worker.stores import StoreRefusal, StoreTrouble, open_store, open_to_write

CONFIGURATION_ERROR = 78  # exit status of a child that would fail again in the same way (sysexits.h)
PARENT = "DIT_SUPERVISOR"  # environment: the supervisor's process id, for end_with_supervisor()
_RESTART_DELAYS_S = (0.2, 1.0, 5.0)  # by how often it died within the last minute
_STOP_TIMEOUT_S = 20.0  # that a child gets to end, besides what the worker's jobs get
_HURRY_S = 1.5  # between two signals of which the second shall not be taken for the first one's double
_POLL_S = 0.1


class StartError(Exception):
    """One clear line for the person who typed `dit up`."""


def end_with_supervisor() -> None:
    """In a child of `dit up`: SIGTERM ourselves once the supervisor is gone. Does nothing for a process started by hand."""
    supervisor = os.environ.get(PARENT)
    if supervisor is None:
        return
    stop_timeout_s = _STOP_TIMEOUT_S + load_settings().drain_seconds

    def watch() -> None:
        while os.getppid() == int(supervisor):
            time.sleep(0.5)
        whole_group = os.getpgrp() == os.getpid()  # as `dit up` starts it: what this process started ends with it
        for pause_s in (_HURRY_S, stop_timeout_s):  # twice: a worker need not finish what it runs for a supervisor that was killed
            if whole_group:
                os.killpg(0, signal.SIGTERM)
            else:
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(pause_s)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="supervisor-watch").start()


@dataclass
class Child:
    """One `dit …` process and how it has fared."""

    name: str
    environment: dict[str, str]
    stop_timeout_s: float = _STOP_TIMEOUT_S
    process: subprocess.Popen[bytes] | None = None
    deaths: list[float] = field(default_factory=list)
    start_at: float = 0.0

    def start(self) -> None:
        command = [sys.executable, "-m", "app.cli", self.name]
        self.process = subprocess.Popen(command, env=self.environment, stdin=subprocess.DEVNULL, process_group=0)

    def check(self, say: Callable[[str], None]) -> None:
        """Start it again if it has died. StartError if it says that it cannot run."""
        if self.process is None:
            if time.monotonic() >= self.start_at:
                self.start()
            return
        status = self.process.poll()
        if status is None:
            return
        if status == CONFIGURATION_ERROR:
            raise StartError(f"the {self.name} cannot run as it is configured")
        _end_group(self.process)
        now = time.monotonic()
        self.deaths = [t for t in self.deaths if now - t < 60] + [now]
        delay = _RESTART_DELAYS_S[min(len(self.deaths), len(_RESTART_DELAYS_S)) - 1]
        say(f"the {self.name} ended ({_describe(status)}); starting it again in {delay:g} s")
        self.process, self.start_at = None, now + delay

    def stop(self) -> None:
        if self.process is None:
            return
        self.process.terminate()  # does nothing if it has ended
        try:
            self.process.wait(self.stop_timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        _end_group(self.process)

    def hurry(self) -> None:
        """A second SIGTERM: the worker gives its jobs back at once."""
        if self.process and self.process.poll() is None:
            self.process.terminate()


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """What an ended child leaves: a compiler in the middle of its work."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # no such group; on macOS only zombies in it
        os.killpg(process.pid, signal.SIGKILL)


def _describe(status: int) -> str:
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"


def say(message: str) -> None:
    print(f"dit: {message}", flush=True)


def up(settings: Settings, model: str | None = None) -> None:
    """Run until SIGINT or SIGTERM. StartError before anything runs if the folder, the port or the checkpoint is not there.

    `model` is a checkpoint folder, or what `dit import` takes; without it, the settings' registry is served.
    """
    stop = threading.Event()
    children: list[Child] = []

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            for child in children:
                child.hurry()
        stop.set()

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    lock = _lock(settings.data)
    try:
        _check_port(settings.host, settings.port)
        chosen = _serving(settings, model, stop) if model is not None else settings
        if not stop.is_set():
            _check_registry(chosen.checkpoints)
            _check_store(chosen.image_store)
            _run(chosen, children, stop)
    finally:
        lock.close()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _run(settings: Settings, children: list[Child], stop: threading.Event) -> None:
    server: EmbeddedServer | None = None
    try:
        if settings.redis_url:
            url = settings.redis_url
            say("using the Redis of DIT_REDIS_URL")
            _check_redis(url, settings.redis_password)
        else:
            say(f"starting the embedded Valkey, its data in {settings.data.resolve()}")
            server = EmbeddedServer(settings.data)
            _start(server)
            _forget_models(server)
            url = server.url
        environment = {**os.environ, "DIT_REDIS_URL": url, PARENT: str(os.getpid()), **_model_variables(settings)}
        children += [Child("api", environment), Child("worker", environment, _STOP_TIMEOUT_S + settings.drain_seconds)]
        say("starting the API and a worker, which loads the checkpoint and warms up")
        _watch(settings, children, server, stop)
    finally:
        say("stopping")
        for child in children:  # the API first, then the worker, which gives its jobs back, then the server that keeps them
            child.stop()
        if server:
            server.stop()


def _serving(settings: Settings, model: str, stop: threading.Event) -> Settings:
    """The settings that serve this checkpoint folder, or what this path or hub id is imported to."""
    try:
        folder = checkpoint_folder(model, settings.data, stop, say)
    except ValueError as error:
        raise StartError(str(error)) from error
    return settings.model_copy(update={"checkpoints": folder.parent, "model": folder.name})


def _model_variables(settings: Settings) -> dict[str, str]:
    chosen = {"DIT_MODEL": settings.model} if settings.model else {}
    return {"DIT_CHECKPOINTS": str(settings.checkpoints.resolve()), **chosen}


def _start(server: EmbeddedServer) -> None:
    try:
        server.start()
    except (RuntimeError, OSError) as error:
        raise StartError(str(error)) from error


def _forget_models(server: EmbeddedServer) -> None:
    """No worker runs yet; the record that one of a killed run left would else be believed until it expires."""
    with Redis.from_url(server.url, protocol=2) as client:
        for key in client.scan_iter(protocol.MODEL_KEYS, count=1000):
            client.delete(key)


def _watch(settings: Settings, children: list[Child], server: EmbeddedServer | None, stop: threading.Event) -> None:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    address = f"http://{host}:{settings.port}"
    ready, next_look = False, 0.0
    while not stop.is_set():
        for child in children:
            child.check(say)
        if server and server.process and server.process.poll() is not None:
            say("the embedded server ended; starting it again")
            _start(server)
        if not ready and time.monotonic() >= next_look:
            next_look = time.monotonic() + 0.5
            ready = _is_ready(address)
            if ready:
                say(f"the API is documented at {address}/docs; Ctrl-C stops everything")
                print(f"ready: {address}", flush=True)
        stop.wait(_POLL_S)


def _is_ready(address: str) -> bool:
    """Asked directly, whatever proxy the environment names."""
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{address}/readyz", timeout=2) as answer:
            return bool(answer.status == 200)
    except (OSError, http.client.HTTPException):  # URLError is an OSError
        return False


def _lock(data: Path) -> IO[str]:
    """The data folder belongs to one `dit up` at a time; the kernel frees the lock however that ends."""
    try:
        data.mkdir(parents=True, exist_ok=True)
        file = (data / "lock").open("w")
    except OSError as error:
        raise StartError(f"the data folder {data.resolve()} cannot be written ({error.strerror}); DIT_DATA names another") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise StartError(f"another `dit up` uses the data folder {data.resolve()}; stop it, or set DIT_DATA") from error
    return file


def _check_registry(registry: Path) -> None:
    found = [p.parent for pattern in ("*/checkpoint.json", "*/latest") for p in registry.glob(pattern)]
    if not found:
        raise StartError(f"no checkpoint in {registry.resolve()}; DIT_CHECKPOINTS names the folder that holds one sub-folder per model")


def _check_store(address: str) -> None:
    """Here, since the API only reads and may be the first; one that is away may come."""
    try:
        store = open_store(address)
        if store:
            open_to_write(store)
    except ValueError as error:
        raise StartError(str(error)) from error
    except StoreRefusal as error:
        raise StartError(f"pictures cannot be kept in {error}; DIT_IMAGE_STORE names another place") from error
    except StoreTrouble as error:
        say(f"image store {error}; it may come")


def _check_port(host: str, port: int) -> None:
    """Bind it for a moment; a run that was killed may need a second to let go."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for attempt in range(12):
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
                return
            except OSError as error:
                if attempt == 11:
                    raise StartError(f"port {port} on {host} cannot be used ({error.strerror}); DIT_PORT names another") from error
        time.sleep(0.2)


def _check_redis(url: str, password: str | None) -> None:
    try:
        with connect(url, password=password, protocol=2, socket_timeout=5) as client:
            client.ping()
    except (RedisError, OSError, ValueError) as error:
        raise StartError(f"the Redis of DIT_REDIS_URL does not answer: {error}") from error
