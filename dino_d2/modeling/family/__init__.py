"""Successors of DINO: one file an idea, off by default. docs/family.md has their numbers, and how to add one."""
