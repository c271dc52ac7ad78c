"""Kernels in Triton, for NVIDIA GPUs. Imported when one of them runs, not before."""
