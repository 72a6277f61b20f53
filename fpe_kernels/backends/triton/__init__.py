"""Fused Triton kernels, the only package of the project that imports triton. :mod:`.backend` is its face."""
