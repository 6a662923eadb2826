"""What this machine does best: compute dtype, threads, memory, kernels."""
