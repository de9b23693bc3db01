"""`python -m benchmarks.gpu`: bits, speed and memory on one CUDA GPU; see docs/gpu.md."""
