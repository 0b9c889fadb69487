"""Measurements on an NVIDIA GPU; `benchmarks/gpu_run.sh` runs them all."""
