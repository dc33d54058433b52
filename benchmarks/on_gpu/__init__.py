"""The steps of benchmarks/gpu.py, one file each, and what they share: progress, clock, work (bytes and operations)."""
