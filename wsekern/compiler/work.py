"""The work of one instruction of a compiled program, in seconds of one chip."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from wsekern.compiler.hlo import Computation, Instruction, Program, Shape
from wsekern.hardware import Accelerator

# They move or name data, and the compiler gives them no time of their own.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "copy-start", "copy-done",
    "slice-start", "slice-done", "partition-id", "replica-id", "after-all", "add-dependency",
    "opt-barrier", "optimization-barrier", "domain", "async-update", "iota", "send", "recv",
}  # fmt: skip
# Custom calls that are not kernels: they name or reserve memory, or mark something.
_NO_KERNEL = {
    "AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "AsyncCollectiveStart",
    "AsyncCollectiveDone", "Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape", "X64Combine",
    "annotate_device_placement",
}  # fmt: skip
PALLAS = {"tpu_custom_call", "__gpu$xla.gpu.triton", "mosaic_gpu", "mosaic_gpu_v2"}


@dataclasses.dataclass(frozen=True)
class Work:
    """What an instruction takes."""

    seconds: float
    cycles: float = 0.0  # the compiler's
    kernel: str = ""  # the name of the vendor's or Pallas' kernel; "" for XLA's own code
    lacks_flops: bool = False  # a kernel whose FLOPs nobody states: priced by its bytes alone


def work_of(
    program: Program,
    computation: Computation,
    one: Instruction,
    chip: Accelerator,
    kernel_flops: Mapping[str, float],
) -> Work | None:
    """The work of an instruction that is no transfer, loop or branch; None if it takes no time.

    Args:
      program: which it is in.
      computation: which has it.
      one: the instruction.
      chip: its peaks price what the compiler gives no cycles.
      kernel_flops: the FLOPs of one call of a kernel, by its name.
    """
    if one.opcode == "custom-call" and one.target not in _NO_KERNEL:
        return _kernel(program, computation, one, chip, kernel_flops)
    if one.cycles is not None and chip.clock_hz:
        return Work(one.cycles / chip.clock_hz, one.cycles)
    # A TPU's compiler leaves out what costs next to nothing; a GPU's estimates nothing at all.
    if chip.clock_hz or one.opcode in _FREE or one.opcode.endswith(("-start", "-done")):
        return None
    if one.opcode == "custom-call":
        return None
    flops = _flops(program, computation, one)
    return Work(_at_peak(flops, _moved_bytes(program, computation, one), chip))


def kernel_name(one: Instruction) -> str:
    """The name of the kernel that a custom call calls: "splash_mha_fwd", "cudnn fmhaSoftmax"."""
    if one.target in PALLAS:
        named = re.search(r'kernel_name[="\s:]+([\w.\-]+)', one.attributes)
        name = named[1] if named else re.sub(r"[.\d]+$", "", one.name)
        return f"Pallas {name}"
    return one.target.replace("__cublas$", "cublas ").replace("__cudnn$", "cudnn ")


def _kernel(
    program: Program,
    computation: Computation,
    one: Instruction,
    chip: Accelerator,
    kernel_flops: Mapping[str, float],
) -> Work:
    name = kernel_name(one)
    flops = kernel_flops.get(name.removeprefix("Pallas "), 0.0)
    stated, moved = _stated("flops", one), _stated("bytes_accessed", one)
    if stated is not None:
        flops = stated
    elif "cublas" in name:
        flops = _flops_of_gemm(computation, one)
    elif "fmha" in name:
        flops = _flops_of_attention(computation, one)
    seconds = _at_peak(flops, moved or _bytes(computation, one), chip)
    return Work(seconds, kernel=name, lacks_flops=not flops)


def _stated(figure: str, one: Instruction) -> float | None:
    """A figure that a kernel states of itself, its `cost_estimate`; None without."""
    found = re.search(rf'"?\b{figure}"?\s*[:=]\s*"?(\d+)', one.attributes)
    return float(found[1]) if found else None


def _at_peak(flops: float, moved: float, chip: Accelerator) -> float:
    return max(flops / chip.bfloat16_flops, moved / chip.memory_bytes_per_second)


def _bytes(computation: Computation, one: Instruction) -> float:
    operands = (computation.by_name.get(name) for name in one.operands)
    return one.bytes + sum(each.bytes for each in operands if each is not None)


def _moved_bytes(program: Program, computation: Computation, one: Instruction) -> float:
    """Bytes that XLA's own code reads and writes: of an array that it only slices, the slices."""
    if one.opcode in ("dynamic-slice", "slice"):
        return 2 * one.bytes
    if one.opcode == "dynamic-update-slice":
        return 2 * _updated_bytes(computation, one)
    inner = program.computations.get(one.called.get("calls", ""))
    if one.opcode != "fusion" or inner is None or inner.root is None:
        return _bytes(computation, one)
    parameters = (each for each in inner.instructions if each.opcode == "parameter")
    return sum(_read_bytes(inner, each) for each in parameters) + _written_bytes(inner, inner.root)


def _read_bytes(inner: Computation, array: Instruction) -> float:
    """Bytes of `array` that the instructions of a fusion read."""
    read = 0.0
    for one in inner.instructions:
        if array.name not in one.operands:
            continue
        if one.opcode == "bitcast":
            read += _read_bytes(inner, one)
        elif one.opcode == "dynamic-slice" and one.operands[0] == array.name:
            read += one.bytes
        elif one.opcode != "dynamic-update-slice" or array.name in one.operands[1:]:
            return array.bytes  # what is updated in place is not read
    return min(read, array.bytes)


def _written_bytes(inner: Computation, result: Instruction) -> float:
    """Bytes that a fusion writes for `result`; an update in place writes only its slice."""
    if result.opcode == "dynamic-update-slice":
        return _updated_bytes(inner, result)
    if result.opcode not in ("bitcast", "tuple"):
        return result.bytes
    operands = (inner.by_name.get(name) for name in result.operands)
    return sum(_written_bytes(inner, each) for each in operands if each is not None)


def _updated_bytes(computation: Computation, one: Instruction) -> float:
    update = computation.by_name.get(one.operands[1]) if len(one.operands) > 1 else None
    return one.bytes if update is None else update.bytes


def _flops(program: Program, computation: Computation, one: Instruction) -> float:
    """FLOPs of the products in an instruction and in what it calls."""
    own = _flops_of_dot(computation, one) if one.opcode == "dot" else 0.0
    inside = (
        _flops(program, inner, each)
        for _, inner in program.called(one)
        for each in inner.instructions
        if each.opcode in ("dot", "fusion", "call")
    )
    return own + sum(inside)


def _flops_of_dot(computation: Computation, one: Instruction) -> float:
    left = computation.by_name.get(one.operands[0]) if one.operands else None
    match = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.attributes)
    if left is None or match is None or not left.shapes or not one.shapes:
        return 0.0
    meeting = 1
    for dim in match[1].split(","):
        meeting *= left.shapes[0].dims[int(dim)] if dim else 1
    return 2.0 * one.shapes[0].size * meeting


def _flops_of_gemm(computation: Computation, one: Instruction) -> float:
    shapes = _operand_shapes(computation, one)
    match = re.search(r'"lhs_contracting_dimensions":\["?(\d+)', one.attributes)
    if not shapes or match is None or not one.shapes:
        return 0.0
    return 2.0 * one.shapes[0].size * shapes[0].dims[int(match[1])]


def _flops_of_attention(computation: Computation, one: Instruction) -> float:
    """Of cuDNN's attention: two products forward and five backward, of all queries and keys."""
    shapes = [s for s in _operand_shapes(computation, one) if len(s.dims) == 4]
    if len(shapes) < 3:
        return 0.0
    query, key = shapes[0].dims, shapes[1].dims
    batch, length, heads, size = query
    products = 5 if "Backward" in one.target else 2
    return 2.0 * products * batch * heads * length * key[1] * size


def _operand_shapes(computation: Computation, one: Instruction) -> list[Shape]:
    operands = (computation.by_name.get(name) for name in one.operands)
    return [shape for each in operands if each is not None for shape in each.shapes]
