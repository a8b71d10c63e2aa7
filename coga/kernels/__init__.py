"""Attention kernels: the plain reference, its Triton twins, and the dispatch between them."""
