"""Kernels that the tuner may time and that no measured row has chosen so far: no rule and no table launches them."""
