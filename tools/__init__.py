"""The `dino-d2` commands, one file each; installed as dino_d2.tools.

Packages that are slow to import are imported in `main`, so that `--help` is fast.
"""
