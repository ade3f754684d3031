"""Attention over sequences split over a grid, and decoding against a cache."""

from wsekern.kernels.attention.attention import attention as attention
