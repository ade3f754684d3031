"""Matrix product: `matmul`, its gradient, and what it refuses."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Num, PyTree

from wsekern import fabric
from wsekern.kernels.matmul import choice, epilogue, tile
from wsekern.kernels.matmul.explain import explain_matmul
from wsekern.kernels.matmul.problem import MatmulPlan, MatmulProblem
from wsekern.kernels.matmul.right_factor import (
    ArrayFactor,
    FactorGradient,
    RightFactor,
    check_right_factor,
    is_trained,
)
from wsekern.kernels.matmul.signature import Algorithm, Matrix, with_signature
from wsekern.kernels.matmul.tile import TileResult
from wsekern.wafer import context, layout, program
from wsekern.wafer.axes import COLS, ROWS, WAFERS
from wsekern.wafer.limits import keeps_shares, sum_dtype
from wsekern.wafer.specs import Specs
from wsekern.wafer.wafer import Wafer

_SHARED_ROWS = P((ROWS, WAFERS), COLS)  # of a gradient of which each wafer keeps a share


@with_signature(explain_matmul)
def matmul(
    a: Float[Array, "*batch _ _"],
    b: Matrix | Sequence[Matrix],
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
    bias: Float[Array, " _"] | Sequence[Float[Array, " _"] | None] | None = None,
    activation: epilogue.Activation = None,
    scales: Float[Array, " _"] | Sequence[Float[Array, " _"] | None] | None = None,
    algorithm: Algorithm = "auto",
    precision: jax.lax.PrecisionLike = None,
    wafer: Wafer | None = None,
) -> Float[Array, "*batch _ _"] | tuple[Float[Array, "*batch _ _"], ...]:
    """`activation(a @ b * scales + bias)`; for a tuple of right factors, a tuple of products.

    Sums are float32 and are rounded once, to `a`'s dtype, after `scales`, `bias` and `activation`.
    `a @ b^T` and `a^T @ b` transpose nothing: in them another of the three matrices moves. The
    gradient consists of these forms and takes the same algorithm, unless `auto` says otherwise. It
    keeps the operands and, if there is an activation, its argument. The gradient of `scales`
    multiplies once more. Reverse mode only. Products that share `a` (query, key and value; gate and
    up) are best asked for in one call: `a` then moves once.

    What each algorithm costs a PE on a grid of h x w, in words received. X and Y are the words of
    its tiles of `a` and `b`, S those of the result (in `a @ b^T`: X the result, S `a`; in
    `a^T @ b`: Y the result, S `b`). `print(wk.matmul.explain(a, b))` shows the numbers.

    - `allgather`: (w - 1) X + (h - 1) Y words in 2 steps; holds w X + h Y.
    - `summa`: w X + h Y words in 2 max(h, w) floods that do not wait for one another; holds a panel
      of each. A panel of the result is summed instead.
    - `cannon`: p (X + Y) words in 2 p steps on p x p; holds two tiles of each. Rectangles too, if
      L = lcm(h, w) <= 2 max(h, w): L - 1 shifts of w X / L and h Y / L, after skews by the binary
      digits of the distance. A wafer has edges: a wrap is as long as the grid.
    - `mesh_gemm`: MeshGEMM, which is Cannon on a folded ring: no word goes further than two hops.
      On rectangles X and Y (or sums) also move to, or from, their place in it. Was "mesh".
    - `collective`: the words of "allgather", but along one axis (x if h Y <= w X) they go round in
      halves while others are multiplied, in 2 w - 1 steps; holds h Y + 2 X. Along y likewise.
    - `stationary`: Y stays. Gathers all M rows of X, (h - 1) X words, floods those that meet Y,
      M K / h, and scatters the sums, (h - 1) S, in 3 steps; holds these rows. If M <= h / 2 only
      true rows move: X M, and 2 (h - 1) S M / h. Many rows go in r rounds: 3 r steps, as many
      words, an r-th held; `a^T @ b`, also as a gradient, is then "summa".
    - `2.5d`: if all c wafers hold the matrices: each does a c-th of "mesh_gemm", then 2 (c - 1) / c
      S words in one step more (half as many, of X or Y, in the other forms).
    - `xla`: on devices, XLA's own program, with "allgather"'s moves or others. In `a @ b^T` and
      `a^T @ b`, or if h does not divide M, it sums over TPUs and GPUs in `a`'s dtype.
    - `auto`: on a wafer the fewest predicted cycles within a quarter of a PE's SRAM. On TPUs and
      GPUs "xla", unless another is predicted to take fewer seconds: "stationary" for few rows, and
      on TPUs "cannon"; the gradient is predicted by itself. On emulated devices "stationary" if it
      moves a quarter of the words of "allgather"; else "allgather" if that holds at most 4 MiB;
      else "stationary" in rounds, or "summa" if the rows do not divide into rounds.

    On TPUs and GPUs the next tiles travel while others are multiplied. "summa" moves the words of
    "allgather" there; on squares it and "cannon" send S and one factor twice, and no sums.

    Args:
      a: left factor, laid out `P("y", "x")`; leading dimensions, if any, `P("wafer", None, ...)`.
        `[..., M, K]`, or `[..., K, M]` with `transpose_a`.
      b: right factor, laid out likewise: one matrix for all leading dimensions of `a`, or one with
        the same leading dimensions; or a tuple of either. `[..., K, N]`, or `[..., N, K]` with
        `transpose_b`. It has `a`'s dtype, or is int8 with `scales`.
      transpose_a: whether `a` is taken transposed; not together with `transpose_b`.
      transpose_b: whether `b` is taken transposed.
      bias: one number a column of the result, laid out `P("x")`; for a tuple, a tuple or None.
      activation: "relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh", or an element-wise
        function of an array that holds no traced values.
      scales: the scale of each output channel of int8 weights; otherwise like `bias`.
      algorithm: one of the above.
      precision: of every product, as in `jax.lax.dot_general`; the gradient's too.
      wafer: where to run; by default the current wafer, and plain `jnp` without one.

    Raises:
      ValueError: the shapes do not fit one another, the dtypes differ or are not floating, int8
        comes without scales, both factors are transposed, or `activation` or `algorithm` is
        unknown, or cannot serve the grid.
    """
    several = isinstance(b, tuple | list)
    form = tile.form_of("matmul", transpose_a, transpose_b)
    a = layout.as_array(a)
    rights = _right_factors(b, bias, scales, several)
    _check(form, a, rights)
    name = choice.find_algorithm("matmul", algorithm)
    function = epilogue.find_activation("matmul", activation)
    wafer = context.resolve(wafer)
    # An empty matrix cannot be cut into tiles.
    if wafer is None or a.size == 0 or any(right.matrix.size == 0 for right in rights):
        cs = tuple(_plain(form, a, right, function, precision) for right in rights)
    else:
        problem = MatmulProblem.of(form, a, [right.matrix for right in rights], wafer)
        plans = choice.plan("matmul", problem, name)
        cs = _on_wafer(a, rights, _MatmulOptions(form, *plans, function, precision), wafer)
    return cs if several else cs[0]


@dataclasses.dataclass(frozen=True)
class _MatmulOptions:
    """Everything that is known of a product but its operands."""

    form: tile.Form
    plan: MatmulPlan
    gradient_plan: MatmulPlan
    activation: epilogue.Function | None
    precision: jax.lax.PrecisionLike

    @property
    def joins(self) -> bool:
        """Whether several right factors are multiplied as one, so that `a` moves once for all.

        In "nt" it stays. In a whole array XLA would have to move the columns of each.
        """
        return self.form != "nt" and self.plan.joins and not self.plan.whole

    def run(
        self, wafer: Wafer, kernel: Callable[..., Any], in_specs: PyTree[P], out_specs: PyTree[P]
    ) -> Callable[..., Any]:
        """`kernel` as a function of whole arrays, by tiles or as XLA splits it."""
        if not self.plan.whole:
            return wafer.map(kernel, in_specs=in_specs, out_specs=out_specs)
        specs = Specs.of(in_specs, out_specs)
        return program.mapped_program(wafer, kernel, specs, False, by_xla=True)


def _plain(
    form: tile.Form,
    a: Float[Array, "... _ _"],
    right: ArrayFactor,
    activation: epilogue.Function | None,
    precision: jax.lax.PrecisionLike,
) -> Float[Array, "... _ _"]:
    b = right.matrix
    a = jnp.swapaxes(a, -1, -2) if form == "tn" else a
    b = jnp.swapaxes(b, -1, -2) if form == "nt" else b
    if right.scales is not None:
        wide, b = sum_dtype(a.dtype), b.astype(a.dtype)
        c = jnp.matmul(a, b, precision=precision, preferred_element_type=wide)
        c = (c * epilogue.as_row(right.scales, c)).astype(a.dtype)
    else:
        c = jnp.matmul(a, b, precision=precision)
    c, _ = epilogue.apply_epilogue(c, right.bias, None, activation)
    return c if c.dtype == a.dtype else c.astype(a.dtype)


def _on_wafer(
    a: Float[Array, "... _ _"],
    rights: tuple[ArrayFactor, ...],
    options: _MatmulOptions,
    wafer: Wafer,
) -> tuple[Float[Array, "... _ _"], ...]:
    form, plan = options.form, options.plan
    spec = plan.spec(a.ndim)
    shapes = [_result_shape(form, a, right.matrix) for right in rights]
    padded = layout.pad(a, spec, wafer, multiples=plan.multiples(tile.ROLES[form][0]))
    laid_out = tuple(
        _lay_out(right, shape, form, plan, wafer)
        for right, shape in zip(rights, shapes, strict=True)
    )
    cs = _product(padded, laid_out, options, wafer)
    return tuple(layout.crop(c, shape, spec, wafer) for c, shape in zip(cs, shapes, strict=True))


def _result_shape(
    form: tile.Form, a: Num[Array, "... _ _"], b: Num[Array, "... _ _"]
) -> tuple[int, ...]:
    rows, columns = a.shape[-1 if form == "tn" else -2], b.shape[-2 if form == "nt" else -1]
    return (*a.shape[:-2], rows, columns)


def _lay_out(
    right: ArrayFactor,
    shape: tuple[int, ...],
    form: tile.Form,
    plan: MatmulPlan,
    wafer: Wafer,
) -> ArrayFactor:
    """`right` padded for `plan`, where `shape` is that of its product."""
    # The result too: in `a @ b^T` it is X, whose columns Cannon's algorithm cuts into blocks.
    _, role, role_of_result = tile.ROLES[form]
    multiples = plan.multiples(role_of_result)
    rows, columns = layout.padded_shape(shape[-2:], layout.tiled(2), wafer, multiples)

    def pad_vector(vector: Float[Array, " N"] | None) -> Float[Array, " _"] | None:
        if vector is None:
            return None
        return layout.pad(vector, layout.tiled(1, COLS), wafer, multiples=multiples[1:])

    spec = layout.tiled(right.matrix.ndim)
    return RightFactor(
        matrix=layout.pad(right.matrix, spec, wafer, multiples=plan.multiples(role)),
        bias=pad_vector(right.bias),
        scales=pad_vector(right.scales),
        tile=(rows // wafer.height, columns // wafer.width),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(
    a: Float[Array, "... _ _"],
    rights: tuple[ArrayFactor, ...],
    options: _MatmulOptions,
    wafer: Wafer,
) -> tuple[Float[Array, "... _ _"], ...]:
    return _forward_program(a, rights, options, wafer, keep=False)(a, rights)[0]


def _forward_program(
    a: Float[Array, "... _ _"],
    rights: tuple[ArrayFactor, ...],
    options: _MatmulOptions,
    wafer: Wafer,
    keep: bool,
) -> Callable[..., Any]:
    spec = options.plan.spec(a.ndim)
    return options.run(
        wafer,
        functools.partial(_per_pe, options=options, keep=keep),
        in_specs=(spec, tuple(right.specs(COLS) for right in rights)),
        out_specs=(spec, spec),
    )


# Plain autodiff would keep every tile that has moved.
def _fwd(
    a: Float[Array, "... _ _"],
    rights: tuple[ArrayFactor, ...],
    options: _MatmulOptions,
    wafer: Wafer,
) -> tuple[tuple[Float[Array, "... _ _"], ...], tuple]:
    keep = options.activation is not None
    cs, arguments = _forward_program(a, rights, options, wafer, keep)(a, rights)
    return cs, (a, rights, arguments)


def _bwd(
    options: _MatmulOptions,
    wafer: Wafer,
    residuals: tuple,
    dcs: tuple[Float[Array, "... _ _"], ...],
) -> tuple[Float[Array, "... _ _"], tuple[FactorGradient, ...]]:
    a, rights, arguments = residuals
    if options.activation is not None:
        # Element by element, so it may stand outside the kernel, where nothing is differentiated.
        pairs = zip(dcs, arguments, strict=True)
        dcs = tuple(epilogue.before_activation(*pair, options.activation) for pair in pairs)
    spec, right_specs = options.plan.spec(a.ndim), tuple(right.specs(COLS) for right in rights)
    options = dataclasses.replace(options, plan=options.gradient_plan)
    shared = tuple(_shares_rows(right, a, wafer) for right in rights)
    gradient_specs = tuple(
        spec_.replace(_SHARED_ROWS if share else spec_.matrix, spec_.bias, spec_.scales)
        for spec_, share in zip(right_specs, shared, strict=True)
    )
    run = options.run(
        wafer,
        functools.partial(_per_pe_gradients, options=options, shared=shared),
        in_specs=(spec, right_specs, spec),
        out_specs=(spec, gradient_specs),
    )
    da, drights = run(a, rights, dcs)
    return da, tuple(d.with_float0(right) for d, right in zip(drights, rights, strict=True))


_product.defvjp(_fwd, _bwd)


def _shares_rows(right: ArrayFactor, a: Float[Array, "*batch _ _"], wafer: Wafer) -> bool:
    """Whether each wafer keeps a share of the rows of a matrix's gradient."""
    one_for_all = a.ndim > 2 and right.matrix.ndim == 2  # of a batch, wafers have parts
    divides = right.matrix.shape[-2] % (wafer.height * wafer.wafers) == 0
    return one_for_all and divides and keeps_shares(wafer)


def _per_pe(
    a: Float[Array, "*batch _ _"],
    rights: tuple[ArrayFactor, ...],
    options: _MatmulOptions,
    keep: bool,
) -> tuple[tuple[Float[Array, "*batch Mt _"], ...], tuple[Float[Array, "*batch Mt _"], ...]]:
    """This PE's tile of each product and, if `keep`, of what its activation was applied to."""
    cs, arguments = [], []
    for sums, right in zip(_sums(a, rights, options), rights, strict=True):
        sums = sums.astype(sum_dtype(sums.dtype))  # they may have traveled in `a`'s dtype
        c, argument = epilogue.apply_epilogue(sums, right.bias, right.scales, options.activation)
        cs.append(c.astype(a.dtype))
        arguments.append(argument.astype(a.dtype))
    return tuple(cs), tuple(arguments) if keep else ()


def _per_pe_gradients(
    a: Float[Array, "*batch _ _"],
    rights: tuple[ArrayFactor, ...],
    dcs: tuple[Float[Array, "*batch Mt _"], ...],
    options: _MatmulOptions,
    shared: tuple[bool, ...],
) -> tuple[Float[Array, "*batch _ _"], tuple[FactorGradient, ...]]:
    along: tuple[str, ...] = (ROWS, WAFERS) if a.ndim > 2 else (ROWS,)  # of a batch, wafers differ
    wafers: tuple[str, ...] = (WAFERS,) if a.ndim > 2 else ()
    if options.plan.whole:  # XLA sums over all PEs by itself
        along = wafers = ()
    products: Sequence[Float[Array, "*batch Mt _"] | None] = [None] * len(rights)
    if rights[0].scales is not None:  # all have scales, or none
        products = _sums(a, rights, options)
    scaled, vectors = [], []
    for dc, sums, right in zip(dcs, products, rights, strict=True):
        wide = dc.astype(sum_dtype(dc.dtype))
        dbias = dscales = None
        if right.bias is not None:
            dbias = epilogue.sum_over_rows(wide, right.bias, along)
        if right.scales is not None and sums is not None:
            dscales = epilogue.sum_over_rows(sums * wide, right.scales, along)
            dc = (wide * epilogue.as_row(right.scales, wide)).astype(a.dtype)
        scaled.append(dc)
        vectors.append((dbias, dscales))
    da, dbs = _gradients(a, [right.matrix for right in rights], scaled, options)
    gradients = []
    for db, (dbias, dscales), right, share in zip(dbs, vectors, rights, shared, strict=True):
        if db is not None:
            # A batch is spread over the wafers, and they all use the same matrix.
            if wafers and db.ndim == 2:
                db = fabric.reduce_scatter(db, WAFERS) if share else fabric.all_reduce(db, wafers)
            db = db.astype(a.dtype)
        gradients.append(right.replace(matrix=db, bias=dbias, scales=dscales))
    return da.astype(a.dtype), tuple(gradients)


def _sums(
    a: Float[Array, "*batch _ _"],
    rights: tuple[ArrayFactor, ...],
    options: _MatmulOptions,
) -> list[Float[Array, "*batch Mt _"]]:
    """The sums of each product on this PE, or of whole arrays."""
    multiply = tile.in_form(options.plan.algorithm, options.form)
    leading, precision = a.shape[:-2], options.precision
    if not options.joins:
        sums = []
        for right in rights:
            result = TileResult((*leading, *right.tile), precision)
            sums.append(multiply(a, right.matrix, result))
        return sums
    rows, columns = rights[0].tile[0], sum(right.tile[1] for right in rights)
    matrices = [right.matrix for right in rights]
    result = TileResult((*leading, rows, columns), precision)
    return _split(multiply(a, _join(matrices), result), matrices)


def _gradients(
    a: Float[Array, "*batch _ _"],
    bs: Sequence[Num[Array, "... _ _"]],
    dcs: Sequence[Float[Array, "*batch Mt _"]],
    options: _MatmulOptions,
) -> tuple[Float[Array, "*batch _ _"], list[Float[Array, "... _ _"] | None]]:
    """The sums of the gradient of `a`, and of each of `bs` that is trained."""
    if not options.joins:
        pairs = [_pair_of_gradients(a, *pair, options) for pair in zip(bs, dcs, strict=True)]
        return functools.reduce(jnp.add, [da for da, _ in pairs]), [db for _, db in pairs]
    da, db = _pair_of_gradients(a, _join(bs), _join(dcs), options)
    return da, [None] * len(bs) if db is None else [*_split(db, bs)]


def _pair_of_gradients(
    a: Float[Array, "*batch _ _"],
    b: Num[Array, "... _ _"],
    dc: Float[Array, "*batch Mt _"],
    options: _MatmulOptions,
) -> tuple[Float[Array, "*batch _ _"], Float[Array, "... _ _"] | None]:
    factors = {"a": a, "b": b, "c": dc}

    def multiply(
        form: tile.Form, left: str, right: str, shape: tuple[int, ...]
    ) -> Float[Array, "... _ _"]:
        run = tile.in_form(options.plan.algorithm, form)
        return run(factors[left], factors[right], TileResult(shape, options.precision))

    gradient_a, gradient_b = tile.GRADIENTS[options.form]
    da = multiply(*gradient_a, a.shape)
    return da, multiply(*gradient_b, b.shape) if is_trained(b) else None


def _join(tiles: Sequence[Num[Array, "... _ _"]]) -> Num[Array, "... _ _"]:
    return tiles[0] if len(tiles) == 1 else jnp.concatenate(tiles, -1)


def _split(
    joined: Num[Array, "... _ _"], like: Sequence[Num[Array, "... _ _"]]
) -> list[Num[Array, "... _ _"]]:
    return jnp.split(joined, np.cumsum([x.shape[-1] for x in like])[:-1], -1)


def _right_factors(
    b: PyTree[ArrayLike], bias: PyTree[ArrayLike], scales: PyTree[ArrayLike], several: bool
) -> tuple[ArrayFactor, ...]:
    if not several:
        return (RightFactor.of(b, bias, scales),)
    for name, value in (("bias", bias), ("scales", scales)):
        if value is not None and (not isinstance(value, tuple | list) or len(value) != len(b)):
            raise ValueError(
                f"matmul: {name} must be a tuple of {len(b)}, one for each right factor, or None"
            )
    biases, scaleses = ([None] * len(b) if v is None else v for v in (bias, scales))
    return tuple(map(RightFactor.of, b, biases, scaleses))


def _check(form: tile.Form, a: Num[Array, "..."], rights: tuple[ArrayFactor, ...]) -> None:
    if not rights:
        raise ValueError("matmul: b is an empty tuple; give at least one right factor")
    for right in rights:
        tile.check_shapes("matmul", form, a, right.matrix)
        N = right.matrix.shape[-2 if form == "nt" else -1]
        check_right_factor("matmul", a, right, N)
    if len({right.matrix.dtype for right in rights}) > 1:
        dtypes = [str(right.matrix.dtype) for right in rights]
        raise ValueError(
            f"matmul: the right factors are {dtypes}; make them alike, or call once for each dtype"
        )
