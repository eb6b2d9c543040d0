"""The GPU kit: checks, times and profiles the GPU kernels on a machine with torch and triton."""
