#!/usr/bin/env python3
"""Check the installation: installed packages, available kernels and their results."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dino_d2_cli import CommandParser

DESCRIPTION = """\
Reports installed packages and available kernels, and tests the kernels. The exit code is 0 if all checks pass."""


def main(arguments: Sequence[str] | None = None) -> int:
    CommandParser([""], DESCRIPTION).parse_args(arguments)
    from dino_d2.doctor import main as examine

    return examine()


if __name__ == "__main__":
    sys.exit(main())
