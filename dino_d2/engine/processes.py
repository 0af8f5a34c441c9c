"""Processes that work together: how they start, and that they start at the same place."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import DEFAULT_TIMEOUT, launch
from detectron2.utils import comm
from torch.distributed.elastic.multiprocessing.errors import record

TIMEOUT = DEFAULT_TIMEOUT  # that processes wait for one another; the main one evaluates alone meanwhile


def run_in_every_process(main: Callable[[Namespace], Any], args: Namespace) -> None:
    """`main(args)` in the processes that torchrun started, else in those that detectron2 starts.

    Args:
        args: with the options of detectron2's `default_argument_parser`.
    """
    if dist.is_torchelastic_launched():
        _run_under_torchrun(main, args)
    else:
        launch(main, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, args=(args,), timeout=TIMEOUT)


@record  # so that torchrun's report has the error of the process that failed first
def _run_under_torchrun(main: Callable[[Namespace], Any], args: Namespace) -> None:
    device = torch.device("cpu")
    if torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
        torch.get_device_module(device).set_device(int(os.environ["LOCAL_RANK"]))
    backend = dist.Backend.default_device_backend_map[device.type]
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(backend, timeout=TIMEOUT, store=_store(processes), rank=rank, world_size=processes)
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
    main(args)
    # Not after an error: the others may wait for this process, which would wait for them. Its end ends them.
    dist.destroy_process_group()


def _store(processes: int) -> dist.Store:
    """Where processes find one another.

    torchrun keeps one through all its restarts, in which processes would find the addresses of those that died, and
    wait for them: on one machine each start has a part of its own. Agents of several machines count their restarts
    each by itself; there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 makes torchrun use a new one.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    kept_by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_server = os.environ["RANK"] == "0" and not kept_by_torchrun
    store = dist.TCPStore(host, port, processes, is_server, timeout=TIMEOUT)
    if kept_by_torchrun and os.environ["GROUP_WORLD_SIZE"] == "1":
        return dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    return store


def check_same_start(facts: Mapping[str, object]) -> None:
    """Compare what every process is about to do.

    Raises:
        RuntimeError: in every process, if two of them differ; it names the first two and what differs.
    """
    everyone = comm.all_gather(dict(facts))
    for rank, theirs in enumerate(everyone):
        keys = [key for key in everyone[0].keys() | theirs.keys() if everyone[0].get(key) != theirs.get(key)]
        if keys:
            lines = [f"{key}: {everyone[0].get(key)} in process 0, {theirs.get(key)} in {rank}" for key in sorted(keys)]
            raise RuntimeError(
                "the processes would not do the same, so none starts:\n  " + "\n  ".join(lines) + "\n"
                "Every machine needs the same config and, to go on with a run, the checkpoint: let OUTPUT_DIR lie on a "
                "file system that all of them share, or copy it to each"
            )
