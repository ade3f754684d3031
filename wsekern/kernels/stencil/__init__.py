"""Stencils on fields split over a grid, and the halo exchange under them."""

from wsekern.kernels.stencil.stencil import stencil as stencil
