"""Timings next to the closest alternatives: run `python -m benchmarks --help`."""
