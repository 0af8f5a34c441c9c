"""Comparisons of detectors that anyone can repeat; `dev/study.py` runs them. Not installed."""
