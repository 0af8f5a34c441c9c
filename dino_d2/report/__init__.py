"""Reports on training runs and on evaluations."""
