"""Benchmarks: `python -m diagnostics.bench [PART ...]`. diagnostics/README.md tells the method and the last figures."""
