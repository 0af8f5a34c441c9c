"""What test_distributed.py runs in two processes: python -m torch.distributed.run … in_parallel.py FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from detectron2.engine import create_ddp_model
from detectron2.utils import comm

from dino_d2.engine.processes import leave_process_groups
from dino_d2.engine.step import StepSettings, StepTrainer
from dino_d2.modeling.criterion import boxes_per_process
from tests.engine.test_distributed import make_model
from tests.synthetic import make_batch

CASES = {"objects": [3, 1, 2, 5], "a process without any": [4, 2, 0, 0], "nothing at all": [0, 0, 0, 0]}


def gradients(counts: list[int], parts: int, folder: Path) -> dict[str, torch.Tensor]:
    """Of one batch, of which each process takes its share."""
    torch.manual_seed(1)
    batch = make_batch(counts)
    share = len(batch) // comm.get_world_size()
    mine = batch[comm.get_rank() * share : (comm.get_rank() + 1) * share]
    model = create_ddp_model(make_model(folder), broadcast_buffers=False, device_ids=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    trainer = StepTrainer(model, [], optimizer, StepSettings(parts, None, "stop", str(folder)), seed=0)
    trainer.iter = 0
    optimizer.zero_grad()
    trainer._accumulate(mine)
    plain = model.module if comm.get_world_size() > 1 else model
    return {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    comm.create_local_process_group(comm.get_world_size())
    results = {(name, parts): gradients(counts, parts, folder) for name, counts in CASES.items() for parts in (1, 2)}
    boxes = boxes_per_process([7, 2][comm.get_rank()], torch.zeros(()))
    if comm.is_main_process():
        torch.save({"gradients": results, "boxes": boxes}, folder / "in_parallel.pth")
    leave_process_groups()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
