"""Entries in worker processes: a time limit each, and a worker that dies or hangs takes only its entry with it."""

import multiprocessing
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

from .check import Result
from .steps import brief


def _serve(connection: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    from .entries import run

    while (name := connection.recv()) is not None:
        try:
            result = run(name)
        except Exception as e:  # of the lane itself
            result = Result(name, "", "FAIL", f"the lane: {brief(e)}")
        connection.send(result)


class Worker:
    """One process, and the entry it is at."""

    def __init__(self, context: Any) -> None:
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.name: str | None = None
        self.since = 0.0

    def give(self, name: str) -> None:
        self.name, self.since = name, time.monotonic()
        self.connection.send(name)

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def run_all(names: list[str], jobs: int, limit: float) -> Iterator[Result]:
    """The results of all entries, as they come."""
    context = multiprocessing.get_context("spawn")
    queue = list(reversed(names))
    workers = [Worker(context) for _ in range(min(jobs, len(names)))]
    try:
        for worker in workers:
            worker.give(queue.pop())
        while any(w.name for w in workers):
            busy = [w for w in workers if w.name]
            ready = wait([w.connection for w in busy], timeout=1.0)
            for worker in busy:
                assert worker.name is not None
                taken = time.monotonic() - worker.since
                if worker.connection in ready:
                    try:
                        result = worker.connection.recv()
                    except EOFError:
                        result = Result(worker.name, "", "FAIL", "its process died", seconds=taken)
                        workers[workers.index(worker)] = worker = _again(worker, context)
                elif taken > limit:
                    result = Result(worker.name, "", "FAIL", f"took more than {limit:.0f} s", seconds=taken)
                    workers[workers.index(worker)] = worker = _again(worker, context)
                else:
                    continue
                worker.name = None
                if queue:
                    worker.give(queue.pop())
                yield result
    finally:
        for worker in workers:
            worker.end()


def _again(worker: Worker, context: Any) -> Worker:
    worker.end()
    return Worker(context)
