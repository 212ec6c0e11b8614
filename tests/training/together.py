"""Several processes that train together, forked from one that has imported torch already, so that they start at once."""

import multiprocessing
import os
import pickle
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

_DEADLINE_S = 240.0


def together(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(*arguments)` returns in each of `size` processes, which find each other as those of torchrun do."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "training.train_dit", "tests.training.toy"])
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ends: list[Connection] = []
    processes = []
    for rank in range(size):
        here, there = context.Pipe(duplex=False)
        environment = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": size,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": store.port,
            "TORCHELASTIC_USE_AGENT_STORE": True,
            "TORCHELASTIC_RESTART_COUNT": 0,
            "TORCHELASTIC_RUN_ID": "test",
        }
        processes.append(context.Process(target=_run, args=(there, {k: str(v) for k, v in environment.items()}, function, arguments)))
        processes[-1].start()
        there.close()
        ends.append(here)
    try:
        return _results(ends)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _run(end: Connection, environment: dict[str, str], function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        end.send_bytes(pickle.dumps((True, function(*arguments))))  # by value: what torch sends by handle dies with its process
    except BaseException:  # noqa: BLE001  # told to the test
        end.send_bytes(pickle.dumps((False, traceback.format_exc())))


def _results(ends: list[Connection]) -> list[Any]:
    found: dict[Connection, Any] = {}
    while len(found) < len(ends):
        ready = wait([end for end in ends if end not in found], _DEADLINE_S)
        assert ready, f"{len(ends) - len(found)} of {len(ends)} processes gave no result in {_DEADLINE_S:.0f} s"
        for end in ready:
            assert isinstance(end, Connection)
            succeeded, found[end] = pickle.loads(end.recv_bytes())
            assert succeeded, found[end]
    return [found[end] for end in ends]


def stop_this_process() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
