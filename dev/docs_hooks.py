"""What MkDocs does with the pages of docs/ before it renders them (mkdocs.yml)."""

from __future__ import annotations

import re
from typing import Any

OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./[^)]+\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to files of the repository that are no pages become their text."""
    return OUTSIDE.sub(r"\1", markdown)
