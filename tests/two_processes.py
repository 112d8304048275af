"""Runs checks in two gloo processes. A failure in either of them fails the test and shows its traceback."""

import faulthandler
import gc
import os
import tempfile
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

needs_gloo = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")


def in_two_processes(*checks: tuple) -> None:
    """Each check: a function of a test module and its arguments behind the rank, all of them to be pickled."""
    context = mp.get_context("spawn")
    errors = context.SimpleQueue()
    # Not a FileStore: where both processes leave at once, one removes the file that the other still waits for.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        try:
            mp.spawn(_work, (store.port, folder, checks, errors), nprocs=2)
        except mp.ProcessExitedException as ended:
            stack = Path(folder, f"stack{ended.error_index}").read_text()
            pytest.fail(errors.get() if not errors.empty() else f"{ended}\n{stack}")


def _work(rank: int, port: int, folder: str, checks: tuple[tuple, ...], errors) -> None:
    stack = os.open(f"{folder}/stack{rank}", os.O_CREAT | os.O_WRONLY)
    faulthandler.enable(stack)
    faulthandler.dump_traceback_later(300, exit=True, file=stack)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.TCPStore("127.0.0.1", port), rank=rank, world_size=2)
    for check, *arguments in checks:
        try:
            check(rank, *arguments)
        except Exception:
            errors.put(f"rank {rank}, {check.__name__}{tuple(arguments)}:\n{traceback.format_exc()}")
            os._exit(1)  # the other process may be waiting in a collective; spawn ends it
    gc.collect()  # a reducer of DDP that leaves the group last would destroy it with the GIL held: a deadlock at times
    dist.barrier()
    dist.destroy_process_group()
