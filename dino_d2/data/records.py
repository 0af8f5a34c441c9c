"""Dataset records in memory shared by all processes of a node."""

from __future__ import annotations

import errno
import logging
import mmap
import os
import pickle
import tempfile
import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.reduction import DupFd
from typing import Any, BinaryIO

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.build import print_instances_class_histogram
from detectron2.data.detection_utils import check_metadata_consistency
from detectron2.utils import comm

from .coco import CocoRecords

Record = dict[str, Any]  # detectron2's dataset dict

logger = logging.getLogger(__name__)


class SharedRecords(Sequence):
    """Records in a memory-mapped file; forked and unpickled copies share the memory.

    The file has no name and disappears with the last process that uses it. Each access creates a new record.
    """

    def __init__(self, descriptor: int):
        """
        Args:
            descriptor: of a file written by :func:`_write`; closed with this object.
        """
        self.descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)
        self.content = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
        length = int.from_bytes(self.content[-8:], "little")
        begin = len(self.content) - 8 - 9 * length
        self.ends = np.frombuffer(self.content, np.int64, length, begin)
        self.wide = np.frombuffer(self.content, bool, length, begin + 8 * length)  # images wider than tall

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> Record:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index = int(index) % len(self)
        begin = self.ends[index - 1] if index else 0
        return pickle.loads(memoryview(self.content)[begin : self.ends[index]])

    def __getstate__(self) -> DupFd:
        return DupFd(self.descriptor)

    def __setstate__(self, state: DupFd) -> None:
        self.__init__(state.detach())


def share_on_node(records: Iterable[Record]) -> SharedRecords:
    """Share the records of the first process of each node with its other processes; all must call this.

    Can be passed to detectron2's `set_default_dataset_from_list_serialize_method`.

    Args:
        records: read only in the first process of the node; pass a generator so that the others need not create them.

    Raises:
        RuntimeError: the first process of a node failed (which raises the original error).
    """
    file = tempfile.TemporaryFile(prefix="dino_d2_records_") if comm.get_local_rank() == 0 else None  # noqa: SIM115
    # Shared through the open file, not a name, so that a killed run leaves nothing behind.
    path = _in_first_of_node(lambda: _write(records, file))
    shared = SharedRecords(os.dup(file.fileno()) if file is not None else os.open(path, os.O_RDONLY))
    comm.synchronize()  # the first process must keep it open until here
    if file is not None:
        file.close()
    return shared


def load_records(names: Sequence[str], filter_empty: bool, needs_annotations: bool) -> SharedRecords:
    """Like detectron2's `get_detection_dataset_dicts`, but in shared memory; all processes must call this.

    Also sets the metadata of the datasets (`MetadataCatalog`) in all processes.

    Args:
        names: datasets in `DatasetCatalog`.
        filter_empty: skip images without objects other than crowds.
        needs_annotations: reject files in COCO format without "annotations", such as those for prediction.

    Raises:
        ValueError: there are no images or annotations, or the datasets have different classes.
        KeyError: a dataset is not registered.
        RuntimeError: any of these happened in another process.
    """
    records = share_on_node(_loaded(names, filter_empty, needs_annotations))
    if not len(records):
        raise ValueError(f"{', '.join(names)}: no images{' with objects' if filter_empty else ''} found")
    for name, metadata in _in_first_of_node(lambda: _describe(records, names)).items():
        known = MetadataCatalog.get(name).as_dict()
        MetadataCatalog.get(name).set(**{key: value for key, value in metadata.items() if key not in known})
    return records


def _loaded(names: Sequence[str], filter_empty: bool, needs_annotations: bool) -> Iterator[Record]:
    skipped = 0
    for name in names:
        dataset = DatasetCatalog.get(name)
        if needs_annotations and isinstance(dataset, CocoRecords) and not dataset.has_annotations:
            raise ValueError(f'{dataset.json_file} of the dataset {name} has no "annotations" to train on')
        for index in range(len(dataset)):
            record = dataset[index]
            if not filter_empty or _is_usable(record):
                yield record
            else:
                skipped += 1
    if filter_empty:
        logger.info(f"Skipped {skipped} images without objects")


def _is_usable(record: Record) -> bool:
    """Whether there is an object to train on; True for datasets that do not use "annotations"."""
    return "annotations" not in record or any(entry.get("iscrowd", 0) == 0 for entry in record["annotations"])


def _describe(records: SharedRecords, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Print the number of objects per class; return the metadata of the datasets."""
    metadata = {name: MetadataCatalog.get(name).as_dict() for name in names}
    if all("thing_classes" in known for known in metadata.values()) and "annotations" in records[0]:
        check_metadata_consistency("thing_classes", names)
        print_instances_class_histogram(records, metadata[names[0]]["thing_classes"])
    return metadata


def _write(records: Iterable[Record], file: BinaryIO) -> str:
    """Write the pickled records, then their end offsets, which are wide, and their number.

    Returns:
        a path through which other processes of this user can open the file.
    """
    ends, wide = array("q"), bytearray()
    try:
        for record in records:
            content = pickle.dumps(record, pickle.HIGHEST_PROTOCOL)
            file.write(content)
            ends.append(len(content) + (ends[-1] if ends else 0))
            wide.append(record.get("width", 0) > record.get("height", 0))
        file.write(ends.tobytes() + wide + len(ends).to_bytes(8, "little"))
        file.flush()
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        folder = tempfile.gettempdir()
        raise OSError(
            error.errno, f"{folder} has no space for the dataset records: set TMPDIR to a larger disk"
        ) from error
    return f"/proc/{os.getpid()}/fd/{file.fileno()}"


def _in_first_of_node(work: Callable[[], Any]) -> Any:
    """Run `work` in the first process of each node and return its result; if it fails in one, all processes fail."""
    result, failure = None, None
    if comm.get_local_rank() == 0:
        try:
            result = work()
        except Exception as error:  # the others must not wait forever
            failure = error
    message = f"{type(failure).__name__}: {failure}" if failure is not None else None
    everywhere = comm.all_gather((result, message))
    if failure is not None:
        raise failure
    for rank, (_, message) in enumerate(everywhere):
        if message is not None:
            raise RuntimeError(f"process {rank}, which reads the data for its node, failed: {message}")
    return everywhere[comm.get_rank() - comm.get_local_rank()][0]
