"""Several gloo processes on this machine, for tests: forked off one server that has imported everything once."""

import datetime
import functools
import multiprocessing
import multiprocessing.forkserver
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def together(worker: Callable[..., Any], ranks: int, folder: Path, *args: Any, timeout: float = 30) -> list[Any]:
    """What `worker(rank, *args)` returns on each of `ranks` processes of one group; of one that raises, the exception; of one that
    dies, its exit code."""
    context = _server()
    queue = context.SimpleQueue()
    meeting = folder / f"meeting-{len(list(folder.glob('meeting-*')))}"
    run = (queue, worker, ranks, meeting, timeout, args)
    workers = [context.Process(target=_run, args=(rank, *run)) for rank in range(ranks)]
    for process in workers:
        process.start()
    for process in workers:
        process.join(120)
        assert process.exitcode is not None, "a rank hangs"
    said = dict(enumerate(process.exitcode for process in workers))
    while not queue.empty():
        rank, what = queue.get()
        said[rank] = torch.load(what, weights_only=False)
    return [said[rank] for rank in range(ranks)]


@functools.cache
def _server() -> Any:
    """A server of this module's own: other tests may have started one that has imported nothing, and ranks would for seconds."""
    multiprocessing.forkserver._forkserver._stop()  # type: ignore[attr-defined]
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_distributed", "tests.test_distributed_training"])
    return context


def _run(rank, queue, worker, ranks, meeting, timeout, args):
    import torch.distributed as dist

    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=timeout)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks, timeout=limit)
    try:
        found = worker(rank, *args)
    except Exception as e:
        traceback.print_exc()
        found = e
    file = f"{meeting}-{rank}.pt"  # a pipe holds little before it is read
    torch.save(found, file)
    queue.put((rank, file))
    if isinstance(found, Exception):
        os._exit(0)  # a broken group cannot be taken down in order
    dist.destroy_process_group()
