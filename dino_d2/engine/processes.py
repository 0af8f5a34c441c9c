"""Start distributed processes and check that they agree."""

from __future__ import annotations

import gc
import os
from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import DEFAULT_TIMEOUT, launch
from detectron2.utils import comm
from torch.distributed.elastic.multiprocessing.errors import record

TIMEOUT = DEFAULT_TIMEOUT  # of collectives; the other processes wait while the main one evaluates


def run_in_every_process(main: Callable[[Namespace], Any], args: Namespace) -> None:
    """Run `main(args)` in the processes started by torchrun, else in processes launched by detectron2.

    Args:
        args: with the options of detectron2's `default_argument_parser`.
    """
    if dist.is_torchelastic_launched():
        _run_under_torchrun(main, args)
    else:
        machines = args.num_machines, args.machine_rank, args.dist_url
        launch(_run_and_leave, args.num_gpus, *machines, args=(main, args), timeout=TIMEOUT)


def leave_process_groups() -> None:
    """Destroy all process groups, and wait until their threads have ended.

    detectron2 keeps its groups, and so does a model of `DistributedDataParallel`, so that `dist.destroy_process_group`
    alone leaves their threads running. A thread that still frees a tensor while Python exits ends the process with
    SIGABRT.
    """
    dist.destroy_process_group()
    comm._LOCAL_PROCESS_GROUP = None
    comm._get_global_gloo_group.cache_clear()
    comm.create_local_process_group.cache_clear()  # else it would create nothing the next time
    gc.collect()  # a trainer and its model refer to each other


@record  # lets torchrun report the first error
def _run_under_torchrun(main: Callable[[Namespace], Any], args: Namespace) -> None:
    device = torch.device("cpu")
    if torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
        torch.get_device_module(device).set_device(int(os.environ["LOCAL_RANK"]))
    backend = dist.Backend.default_device_backend_map[device.type]
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(backend, timeout=TIMEOUT, store=_store(processes), rank=rank, world_size=processes)
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
    _run_and_leave(main, args)


def _run_and_leave(main: Callable[[Namespace], Any], args: Namespace) -> None:
    main(args)
    # Not after an error: it would wait for processes that wait for this one. Exiting ends them.
    if dist.is_initialized():
        leave_process_groups()


def _store(processes: int) -> dist.Store:
    """The rendezvous store.

    torchrun reuses its store across restarts, where processes would find and wait for the addresses of dead ones. So
    on one machine each restart uses its own prefix. Agents on several machines count restarts separately; there
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 makes torchrun use a new store.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    uses_agent_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_server = os.environ["RANK"] == "0" and not uses_agent_store
    store = dist.TCPStore(host, port, processes, is_server, timeout=TIMEOUT)
    if uses_agent_store and os.environ["GROUP_WORLD_SIZE"] == "1":
        return dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    return store


def check_same_start(facts: Mapping[str, object]) -> None:
    """Check that all processes have the same `facts`.

    Raises:
        RuntimeError: in every process, if two differ; it names the first two and the differences.
    """
    everyone = comm.all_gather(dict(facts))
    for rank, theirs in enumerate(everyone):
        keys = [key for key in everyone[0].keys() | theirs.keys() if everyone[0].get(key) != theirs.get(key)]
        if keys:
            lines = [f"{key}: {everyone[0].get(key)} in process 0, {theirs.get(key)} in {rank}" for key in sorted(keys)]
            raise RuntimeError(
                "the processes disagree, so training does not start:\n  " + "\n  ".join(lines) + "\n"
                "Every machine needs the same config and, to resume a run, the checkpoint: put OUTPUT_DIR on a shared "
                "file system, or copy it to each machine"
            )
