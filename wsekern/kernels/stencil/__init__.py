"""Stencils on fields split over a grid, and the halo exchange under them."""

from wsekern.kernels.stencil.stencil import stencil as stencil
from wsekern.kernels.stencil.stencil import stencil_tile as stencil_tile
