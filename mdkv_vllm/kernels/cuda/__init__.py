"""Kernels in CUDA (csrc/cuda). Importing it needs neither CUDA nor the library."""
