"""What users run, each file the main of one `dino-d2` command; installed as dino_d2.tools.

Packages that take seconds to import are imported in `main`, so that `--help` comes at once.
"""
