"""Losses, matching and fusion of DINO's successors, off by default. See docs/family.md, also for how to add one."""
