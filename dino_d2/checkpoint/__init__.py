"""Load and convert weights, and check that a checkpoint matches the model."""

from .assumptions import Assumptions
from .backbone import from_backbone
from .checkpointer import DINOCheckpointer
from .convert import Conversion, from_published, to_published
from .files import read_published
from .sources import to_ours

__all__ = [
    "Assumptions",
    "Conversion",
    "DINOCheckpointer",
    "from_backbone",
    "from_published",
    "read_published",
    "to_ours",
    "to_published",
]
