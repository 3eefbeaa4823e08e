"""Benchmarks: what is here, timed beside what else there is."""
