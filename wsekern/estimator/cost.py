"""The cycles that one equation of a trace costs the PE that computes it.

A PE issues vector instructions, whose operands are described, not copied: a slice, a transpose or a
reshape of a tile is another description of it, and free. An instruction takes cycles to start, then
a number for each element. A tile product of Mt x Kt and Kt x Nt is Mt Kt multiply-accumulates of a
vector of Nt elements (or Nt Kt of Mt elements, if those are longer), in min(Mt, Nt, Kt) loops: a
loop describes its vectors anew. What depends only on where a PE stands is known when the program is
put on the wafer, and costs nothing.

Only `Constants` are fitted, on the published points that `validation.points.FITTED` names.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from typing import Any, NamedTuple

from jax.extend.core import Jaxpr, JaxprEqn

from wsekern.estimator import factorizations, trace
from wsekern.estimator.product_sizes import PRODUCTS, product_sizes
from wsekern.hardware import Machine


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constants:
    """The fitted constants, in cycles; the same for every machine and every program."""

    # To start a vector instruction, also one that sends or receives, or a loop of a tile product.
    vector_start: float = 14.95
    product_start: float = 2.81  # to start a multiply-accumulate within a tile product's loops
    # To start a loop's trip that moves anything, or a phase of a collective. A reduction that
    # repeats the last one starts none.
    phase_start: float = 169.2
    # Float32 takes more than a cycle for each element where several vectors meet in the memory's
    # banks; a multiply-accumulate also writes one of them back. At 16 bits the elements that one
    # cycle could take meet there in the same way.
    paired_float32: float = 1.491  # an element of a float32 instruction that reads two vectors
    accumulate_float32: float = 2.243  # an element of a float32 multiply-accumulate


DEFAULT = Constants()

# Operations that only describe a tile in another way, or name it.
VIEWS = frozenset(
    "reshape transpose broadcast_in_dim squeeze slice dynamic_slice rev expand_dims pvary pcast "
    "copy copy_p unstack stop_gradient optimization_barrier convert_element_type reduce_precision "
    "iota axis_index sharding_constraint layout_constraint mesh_cast device_put split "
    "bitcast_convert_type create_token after_all empty empty2 platform_index name random_wrap "
    "random_unwrap".split()
)
ELEMENTWISE = frozenset(
    "add sub mul max min neg abs sign floor ceil round and or not xor eq ne lt le gt ge select_n "
    "clamp add_any integer_pow square is_finite rem shift_left shift_right_logical "
    "shift_right_arithmetic population_count clz nextafter real imag conj complex eq_to le_to "
    "lt_to".split()
)
# Operations that write their operands elsewhere.
_COPIES = frozenset(
    "concatenate stack pad tile gather scatter dynamic_update_slice scatter-add scatter-sub "
    "scatter-mul scatter-min scatter-max get swap addupdate".split()
)
# Copies, and which operand they copy. The instruction that computes this operand can write its
# result where the copy would put it.
_WRITES = {"pad": 0, "dynamic_update_slice": 1}
_REDUCTIONS = frozenset(
    "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor reduce argmax "
    "argmin cumsum cummax cummin cumprod cumlogsumexp".split()
)
_SEARCHES = frozenset(["top_k", "approx_top_k"])  # read all for a few results
# Functions that have no instruction, by the number of passes over the vector that they take in
# float32: a range reduction and a polynomial, or a first guess and Newton's steps.
_PASSES = {
    "exp": 8, "exp2": 7, "expm1": 9, "log": 9, "log1p": 10, "tanh": 12, "logistic": 12, "erf": 12,
    "erf_inv": 14, "sin": 10, "cos": 10, "tan": 14, "pow": 18, "div": 4, "rsqrt": 4, "sqrt": 5,
    "cbrt": 6, "atan2": 14, "sinh": 12, "cosh": 12, "asin": 16, "acos": 16, "atan": 12, "asinh": 20,
    "acosh": 20, "atanh": 16, "erfc": 14,
    # Threefry, for two words: 20 rounds of five operations, and 5 additions of keys.
    "threefry2x32": 116, "random_bits": 58, "random_fold_in": 58, "random_split": 58,
    "random_seed": 1,
}  # fmt: skip
RANDOM = frozenset("threefry2x32 random_bits random_gamma rng_bit_generator rng_uniform".split())
_WINDOWS = frozenset(
    "reduce_window reduce_window_sum reduce_window_max reduce_window_min select_and_gather_add "
    "select_and_scatter select_and_scatter_add".split()
)
# How a user asks for an operation whose name in a trace is JAX's own.
_ASKED_FOR = {
    "rng_bit_generator": "jax.lax.rng_bit_generator",
    "random_gamma": "jax.random.gamma", "rng_uniform": "jax.lax.rng_uniform",
    "lu_pivots_to_permutation": "jax.lax.linalg.lu_pivots_to_permutation",
    "householder_product": "jax.lax.linalg.householder_product", "geqrf": "jax.lax.linalg.qr",
    "geqp3": "jax.lax.linalg.qr", "pure_callback": "jax.pure_callback",
    "io_callback": "jax.experimental.io_callback", "debug_callback": "jax.debug.callback",
    "debug_print": "jax.debug.print",
}  # fmt: skip
KNOWN = (
    VIEWS
    | ELEMENTWISE
    | _COPIES
    | _REDUCTIONS
    | _WINDOWS
    | _PASSES.keys()
    | frozenset(PRODUCTS)
    | factorizations.FACTORIZATIONS
    | {"fft"}
)


class Work(NamedTuple):
    """The work of one PE for an equation."""

    cycles: float = 0.0
    flops: float = 0.0  # a multiply-accumulate is two
    port_bytes: float = 0.0  # read from the PE's memory and written to it
    narrow: bool = False  # whether its elements have 16 bits
    starts: float = 0.0  # of the cycles, those that start instructions, whatever they work on

    def scale(self, share: float) -> Work:
        """The work if only a share of its instructions is issued, as when zeros are skipped."""
        return self._replace(
            cycles=share * self.cycles,
            flops=share * self.flops,
            port_bytes=share * self.port_bytes,
            starts=share * self.starts,
        )


def equation_work(
    equation: JaxprEqn,
    machine: Machine,
    constants: Constants,
    accumulates: bool = False,
    vectors_along_rows: bool = False,
) -> Work:
    """The work of a PE for `equation`, whose operands are the PE's tiles.

    Args:
      equation: of a jaxpr; an operation that is not in `KNOWN` counts as elementwise.
      machine: says how many elements a cycle takes.
      constants: the fitted constants.
      accumulates: whether the equation adds a product, so that both are one multiply-accumulate.
      vectors_along_rows: whether the vectors of a tile product are columns of its left factor, even
        where rows of the right one are longer.
    """
    name = equation.primitive.name
    if name in VIEWS:
        return Work()
    if name in PRODUCTS:
        return _product(equation, machine, constants, vectors_along_rows)
    if name in factorizations.FACTORIZATIONS:
        return _factorization(equation, machine, constants)
    if not equation.outvars:  # such as a callback to the host
        return Work()
    out = max((v.aval for v in equation.outvars), key=_size)
    n, reads = _size(out), [v.aval for v in equation.invars if size_of(v) > 1]
    instructions = 1
    # Elements that are written and vectors that are read, where the result's shape misleads: an
    # update in place touches only the update, a reduction reads more than it writes.
    if name == "dynamic_update_slice":
        n, reads = size_of(equation.invars[1]), [equation.invars[1].aval]
    elif name in ("concatenate", "stack", "pad"):
        instructions = len(equation.invars)
    elif name in _REDUCTIONS | _SEARCHES:
        n = max(map(_size, reads), default=1)
    elif name in _WINDOWS:
        windows = min(n, size_of(equation.invars[0])) if name.startswith("select") else n
        n = windows * math.prod(equation.params["window_dimensions"])
    elif name == "gather":
        reads = [out, equation.invars[1].aval]  # of what it gathers from, only what it gathers
    if name.startswith("scatter"):
        n, reads = size_of(equation.invars[2]), [equation.invars[2].aval]
    passes_each = _PASSES.get(name, 1)
    if name == "fft":  # a butterfly of ten operations for every two elements, log2 times
        passes_each = math.ceil(5 * math.log2(max(2, math.prod(equation.params["fft_lengths"]))))
    elif name == "sort":  # two lists are merged, log2 times
        length = equation.outvars[0].aval.shape[equation.params["dimension"]]  # type: ignore[attr-defined]
        passes_each = math.ceil(math.log2(max(2, length)))
    elif _is_complex(out):  # real and imaginary parts; of a product, four of them
        passes_each *= 4 if name in ("mul", "div", "integer_pow", "square") else 2
    passes = passes_each * instructions
    if n == 1:  # scalars lie in registers: one cycle each, and no instruction to start
        return Work(float(passes), float(passes))
    float32 = constants.accumulate_float32 if accumulates else 1.0
    if not accumulates and sum(_size(a) == n for a in reads) > 1:
        float32 = constants.paired_float32
    each = _cycles_of_element(width_of(out), machine, float32)
    elements = n * passes_each
    flops = 0 if name in _COPIES else elements * (2 if accumulates else 1)
    moved = elements * min(width_of(out), 4) + sum(_size(a) * width_of(a) for a in reads)
    # No instruction is faster than the memory's ports.
    ports = machine.read_bytes_per_cycle + machine.write_bytes_per_cycle
    starts = passes * constants.vector_start
    cycles = starts + max(elements * each, moved / ports)
    return Work(cycles, flops, moved, width_of(out) == 2, starts)


def copy_work(aval: Any, machine: Machine, constants: Constants) -> Work:
    """The work of writing an array elsewhere."""
    n, width = _size(aval), width_of(aval)
    moved = 2.0 * n * width
    ports = machine.read_bytes_per_cycle + machine.write_bytes_per_cycle
    cycles = constants.vector_start + max(
        n * max(1, width // 4) * _cycles_of_element(width, machine, 1.0), moved / ports
    )
    return Work(cycles, 0.0, moved, width == 2, constants.vector_start)


class Fusions(NamedTuple):
    """Equations of a jaxpr that share one instruction. For

      c = mul a b
      e = add c d
      f = dynamic_update_slice g e 0

    `products` has c, `sums` has {1: "mul"}, and `copies` has 2 if nothing else reads c and e.
    """

    products: frozenset[Any]  # products that one sum takes in: a multiply-accumulate with it
    sums: dict[int, str]  # those sums by their places, with the operation of the product
    copies: frozenset[int]  # places of copies whose operand is computed right where it is copied to


def find_fusions(jaxpr: Jaxpr) -> Fusions:
    """Which equations share an instruction; only a result that is used once can be fused."""
    uses: collections.Counter = collections.Counter()
    for atoms in [*(equation.invars for equation in jaxpr.eqns), jaxpr.outvars]:
        uses.update(atom for atom in atoms if not trace.is_literal(atom))
    made = {v: e.primitive.name for e in jaxpr.eqns for v in e.outvars if uses[v] == 1}
    products: set[Any] = set()
    sums: dict[int, str] = {}
    copies = set()
    for place, equation in enumerate(jaxpr.eqns):
        name = equation.primitive.name
        sources = [v for v in equation.invars if not trace.is_literal(v) and v in made]
        if name in ("add", "sub", "add_any"):
            factor = next((v for v in sources if made[v] in ("mul", "dot_general")), None)
            if factor is not None:
                products.add(factor)
                sums[place] = made[factor]
        elif name in _WRITES:
            source = equation.invars[_WRITES[name]]
            if source in sources and made[source] in ELEMENTWISE | {"dot_general"}:
                copies.add(place)
    return Fusions(frozenset(products), sums, frozenset(copies))


def _product(
    equation: JaxprEqn, machine: Machine, constants: Constants, vectors_along_rows: bool
) -> Work:
    batch, M, K, N = product_sizes(equation)
    if not M * N * K * batch:
        return Work()
    a: Any = equation.invars[0].aval
    width = 4 if _is_complex(a) else width_of(a)  # of a real or imaginary part
    # A vector lies along the longer side. The instructions loop over the shorter one and over K,
    # the longer of both inside.
    few, many = (N, M) if vectors_along_rows else sorted((M, N))
    loops = batch * (K if vectors_along_rows else min(K, few))
    each = _cycles_of_element(width, machine, constants.accumulate_float32)
    instructions = batch * K * few
    elements = instructions * many
    cycles = loops * constants.vector_start + instructions * constants.product_start
    cycles += elements * each
    # Each element reads a factor and the sum, and writes the sum back.
    return Work(cycles, 2.0 * elements, 3.0 * elements * width, width == 2)


def _factorization(equation: JaxprEqn, machine: Machine, constants: Constants) -> Work:
    operand: Any = equation.invars[factorizations.place_of_operand(equation.primitive.name)].aval
    width = width_of(operand)
    flops = factorizations.operation_count(equation)
    if _is_complex(operand):  # a product of complex numbers is four of their parts
        flops, width = 4 * flops, 4
    # Each step starts an instruction for each matrix; those of one matrix are not spread.
    starts = factorizations.step_count(equation) * constants.vector_start
    cycles = starts * max(1, math.prod(operand.shape[:-2]))
    each = _cycles_of_element(width, machine, constants.accumulate_float32)
    cycles += flops / 2 * each
    return Work(cycles, flops, 1.5 * flops * width, width == 2, starts)


def user_term(name: str) -> str:
    """What a user calls the operation that is called `name` in a trace."""
    return _ASKED_FOR.get(name, name)


def width_of(aval: Any) -> int:
    """Bytes of an element; 4 for a random key, for which NumPy has no dtype."""
    return getattr(aval.dtype, "itemsize", 4)


def size_of(atom: Any) -> int:
    """Elements of a variable or a literal."""
    return math.prod(getattr(atom.aval, "shape", ()))


def _is_complex(aval: Any) -> bool:
    return getattr(aval.dtype, "kind", "") == "c"


def _cycles_of_element(width: int, machine: Machine, float32: float) -> float:
    return float32 / machine.fmacs_float16 if width == 2 else float32 if width == 4 else 1.0


def _size(aval: Any) -> int:
    return math.prod(getattr(aval, "shape", ()))
