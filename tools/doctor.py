#!/usr/bin/env python3
"""Check the installation: what is there, which kernels will serve, whether they compute what they should."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dino_d2_cli import CommandParser

DESCRIPTION = """\
What is installed, which kernels will serve, and whether they compute what they should. The exit code is 0 if all is
well."""


def main(arguments: Sequence[str] | None = None) -> int:
    CommandParser([""], DESCRIPTION).parse_args(arguments)
    from dino_d2.doctor import main as examine

    return examine()


if __name__ == "__main__":
    sys.exit(main())
