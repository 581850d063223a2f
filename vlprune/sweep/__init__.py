"""Sweeps: a table of runs, made stage by stage by worker processes."""
