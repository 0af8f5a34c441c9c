"""What test_records.py runs in two processes: python -m torch.distributed.run … FOLDER."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import torch.distributed as dist
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm

from dino_d2.data.records import load_records
from dino_d2.engine.processes import leave_process_groups


def main(output: Path) -> None:
    dist.init_process_group("gloo")
    comm.create_local_process_group(comm.get_world_size())
    calls = []

    def load() -> list[dict]:
        calls.append(1)
        MetadataCatalog.get("sound").thing_classes = ["a", "b"]
        annotations = [{"category_id": 1, "bbox": [1, 2, 3, 4]}]
        return [{"file_name": f"{i}.png", "width": i, "height": 3, "annotations": annotations} for i in range(6)]

    def fail() -> list[dict]:
        raise OSError("the disk is gone")

    DatasetCatalog.register("sound", load)
    DatasetCatalog.register("broken", fail)
    records = load_records(["sound"], filter_empty=True, needs_annotations=True)
    state = os.fstat(records.descriptor)
    found = {"file": [state.st_dev, state.st_ino], "records": list(records), "wide": records.wide.tolist()}
    found |= {"calls": len(calls), "classes": MetadataCatalog.get("sound").get("thing_classes")}
    found["left"] = [path.name for path in Path(tempfile.gettempdir()).iterdir() if "records" in path.name]
    try:
        load_records(["broken"], filter_empty=True, needs_annotations=True)
    except (OSError, RuntimeError) as error:
        found["error"] = f"{type(error).__name__}: {error}"
    (output / f"{comm.get_rank()}.json").write_text(json.dumps(found))
    leave_process_groups()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
