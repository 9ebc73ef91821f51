"""Kernels, one folder per op: `reference` is the specification, `op` picks the backend."""
