"""This file is the matrix product by Cannon's algorithm: tiles travel round the grid, uncopied.

Public per-PE functions, of tiles on p x p PEs. L. E. Cannon, "A Cellular Computer to Implement the
Kalman Filter Algorithm", 1969. On the folded ring it is MeshGEMM of C. He et al., "WaferLLM: Large
Language Model Inference at Wafer Scale", OSDI 2025: no tile ever goes further than two hops a step.
"""

from jax import lax
from jaxtyping import Array, Float

from wsekern import fabric
from wsekern.axes import COLS, ROWS
from wsekern.kernels import tile_product as tile


def forward(
    a: Float[Array, "*batch Mt Kt"], b: Float[Array, "... Kt Nt"], ring: fabric.Ring
) -> Float[Array, "*batch Mt Nt"]:
    """This PE's tile of `a @ b`, in float32: a skew of both, then p products and p - 1 shifts.

    A PE holds two tiles of each operand at a time, one of them on its way, and one of the result.
    """
    a, b = _skewed(a, b, ring)

    def step(carry, _):
        a, b, c = carry
        coming = _shifted(a, COLS, ring), _shifted(b, ROWS, ring)
        return (*coming, c + tile.product(a, b)), None

    c = tile.zeros((*a.shape[:-1], b.shape[-1]), a)
    # The last tiles are met outside the loop, where they need not travel on.
    (a, b, c), _ = lax.scan(step, (a, b, c), length=fabric.axis_size(ROWS) - 1)
    return c + tile.product(a, b)


def backward(
    a: Float[Array, "*batch Mt Kt"],
    b: Float[Array, "... Kt Nt"],
    dc: Float[Array, "*batch Mt Nt"],
    ring: fabric.Ring,
) -> tuple[Float[Array, "*batch Mt Kt"], Float[Array, "... Kt Nt"]]:
    """This PE's tiles of `dc @ b^T` and `a^T @ dc`, in float32.

    The operands go the way of the forward pass and the gradient of each tile travels with it, so
    that every PE it meets can add its part; at the end the gradients are brought home. There are
    2 p products, and twice the moves of the forward pass.
    """
    a, b = _skewed(a, b, ring)

    def step(carry, _):
        a, b, da, db = carry
        coming = _shifted(a, COLS, ring), _shifted(b, ROWS, ring)
        da, db = _added(da, db, a, b, dc)
        return (*coming, _shifted(da, COLS, ring), _shifted(db, ROWS, ring)), None

    carry = (a, b, tile.zeros(a.shape, a), tile.zeros(b.shape, a))
    (a, b, da, db), _ = lax.scan(step, carry, length=fabric.axis_size(ROWS) - 1)
    da, db = _added(da, db, a, b, dc)
    # PE (y, x) has met a[y, y + x + p - 1] last.
    da = fabric.skew(da, COLS, ROWS, times=1, plus=-1, ring=ring)
    return da, fabric.skew(db, ROWS, COLS, times=1, plus=-1, ring=ring)


def _skewed(a, b, ring):
    # Afterwards PE (y, x) holds a[y, y + x] and b[y + x, x], whose product it needs; so does it
    # after every shift of both. Places are those in the ring.
    return (
        fabric.skew(a, COLS, ROWS, times=-1, ring=ring),
        fabric.skew(b, ROWS, COLS, times=-1, ring=ring),
    )


def _shifted(x, along, ring):
    return fabric.shift(x, along, -1, ring=ring)


def _added(da, db, a, b, dc):
    return da + tile.left_gradient(dc, b), db + tile.right_gradient(a, dc, b.ndim)
