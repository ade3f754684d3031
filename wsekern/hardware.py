"""Figures of wafer-scale engines, and of the accelerators they are compared with.

They are for one wafer or one device, each with its source. The clock is kept apart from cycles:
published work turns the same cycles into seconds at 0.85 and at 1.1 GHz.
"""

import dataclasses
import numbers

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB
GB = 10**9
TERA = 1e12
_FASTEST_HZ = 1e12  # of the clocks that a plan or an estimate takes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """A wafer-scale engine: a grid of PEs and the fabric between them."""

    name: str
    system: str  # the product that the wafer is sold in
    grid_height: int  # PEs of the wafer, north to south
    grid_width: int
    usable_height: int  # the largest rectangle that one program can use
    usable_width: int
    fmacs_float32: int  # fused multiply-adds of one PE in one cycle
    fmacs_float16: int  # of float16 and bfloat16 operands: the SIMD lanes
    clock_hz: float  # a default; pass your own where it matters
    power_watts: float | None  # the system under load; None: not published
    idle_watts: float | None = None  # the system at rest; None: not published
    cores: int | None = None  # made on the wafer, spare ones included; None: not published
    # One PE has 48 KB of SRAM in eight banks, reads two 8-byte words and writes one a cycle: Hot
    # Chips 33 and 34 talks (S. Lie, 2021 and 2022). 893,064 PEs x 24 B x 0.85 GHz are the 18.2 PB/s
    # that the roofline of the ASPLOS 2026 stencil compiler paper draws.
    sram_bytes: int = 48 * KIB
    read_bytes_per_cycle: int = 16
    write_bytes_per_cycle: int = 8
    # A link carries one 32-bit word a cycle in each direction, a hop takes one cycle and the ramp
    # between PE and router two: Luczynski et al., "Near-Optimal Wafer-Scale Reduce", HPDC 2024.
    link_bytes_per_cycle: int = 4
    hop_cycles: int = 1
    ramp_cycles: int = 2
    colors: int = 24  # how many routes a router can tell apart; same source
    # A program can use sixteen channels of about 7 Gb/s of the system's 100 Gb Ethernet.
    io_bytes_per_second: float = 14e9
    # Memory of a PE for the instructions of a real kernel: the 25-point stencil, SC 2022.
    code_bytes: int = 22 * KIB

    def __post_init__(self) -> None:
        if self.usable_height > self.grid_height or self.usable_width > self.grid_width:
            raise ValueError(
                f"Machine {self.name}: the usable {self.usable_height}x{self.usable_width} is "
                f"larger than its grid, {self.grid_height}x{self.grid_width}"
            )
        if self.cores is not None and self.cores < self.grid_height * self.grid_width:
            raise ValueError(
                f"Machine {self.name}: {self.cores} cores are fewer than its grid, "
                f"{self.grid_height}x{self.grid_width}, has PEs"
            )

    @property
    def usable_pes(self) -> int:
        """How many PEs one program can use."""
        return self.usable_height * self.usable_width

    @property
    def spare_columns(self) -> int:
        """Columns of spare PEs, which replace faulty ones.

        Where they lie is not published. All cores beyond the grid are assumed to be whole columns
        east of it.
        """
        return 0 if self.cores is None else self.cores // self.grid_height - self.grid_width

    @property
    def physical(self) -> tuple[int, int]:
        """(rows, columns) of all PEs that are made, spare columns included."""
        return self.grid_height, self.grid_width + self.spare_columns

    def fmacs_per_cycle(self, dtype: str) -> int:
        """Fused multiply-adds of one PE in one cycle, on operands of `dtype`.

        Args:
          dtype: "float32", "float16" or "bfloat16".

        Raises:
          ValueError: there is no figure for `dtype`.
        """
        lanes = {
            "float32": self.fmacs_float32,
            "float16": self.fmacs_float16,
            "bfloat16": self.fmacs_float16,
        }
        if dtype not in lanes:
            raise ValueError(f"{self.name}: no figure for dtype={dtype!r}, only for {list(lanes)}")
        return lanes[dtype]

    def peak_flops(self, dtype: str, clock_hz: float | None = None) -> float:
        """FLOP/s of all usable PEs, two for a fused multiply-add, without sparsity.

        Args:
          dtype: "float32", "float16" or "bfloat16".
          clock_hz: cycles a second; by default the machine's own.

        Raises:
          ValueError: there is no figure for `dtype`.
        """
        return 2.0 * self.fmacs_per_cycle(dtype) * self.usable_pes * (clock_hz or self.clock_hz)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accelerator:
    """One GPU or TPU chip, for comparisons and for fractions of its peak."""

    name: str
    kind: str  # a part of JAX's name for it (`device.device_kind`), in lower case
    bfloat16_flops: float  # dense peak, FLOP/s
    float32_flops: float | None  # without reduced-precision tricks; None: not published
    memory_bytes: int
    memory_bytes_per_second: float
    power_watts: float | None  # limit of the board; None: not published
    cache_bytes: int = 0  # shared by the chip's cores; data that stay in it are not read again
    launch_seconds: float = 0.0  # what each kernel takes beside the time it runs
    link_bytes_per_second: float | None = None  # of one link, in one direction; None: not published
    clock_hz: float | None = None  # of the cycles that its compiler counts; None: it counts none

    def memory_traffic(self, data: float, launches: int) -> float:
        """Bytes that cross the memory if each of `launches` kernels reads and writes `data` bytes.

        Between launches the data stay in the cache, if it holds them.
        """
        return data * launches if data > self.cache_bytes else data


# Grids are as published, "750 x 994", taken as height x width. The vendor's tools count columns
# first, so that their west is this library's north. A program may lie on the wafer either way.

# WSE-1: 400,000 cores, 18 GB, 16 nm (Hot Chips 31). The grid is the one that Rocki et al., "Fast
# Stencil-Code Computation on a Wafer-Scale Processor", SC 2020, computed on; the whole one is
# larger and was not read in a source. Four-way float16 SIMD: same paper. Power: CS-1 data sheet.
WSE1 = Machine(
    name="WSE-1",
    system="CS-1",
    grid_height=600,
    grid_width=595,
    usable_height=600,
    usable_width=595,
    cores=400_000,
    fmacs_float32=1,
    fmacs_float16=4,
    clock_hz=0.85e9,  # WSE-2's; none was published for this wafer
    power_watts=20_000.0,
)

# WSE-2: 850,000 cores, 40 GB, 7 nm (Hot Chips 33, 34). The compiler's grid is 757 x 996; with the
# framework that copies to and from the host seven of the 757 and two of the 996 are taken (SDK
# documentation). Power: average in a 25-point stencil run, Jacquelin, Araya-Polo and Meng,
# "Scalable Distributed High-Order Stencil Computations", SC 2022.
WSE2 = Machine(
    name="WSE-2",
    system="CS-2",
    grid_height=757,
    grid_width=996,
    usable_height=750,
    usable_width=994,
    cores=850_000,  # the published count, more than the compiler's grid has; what is made: unknown
    fmacs_float32=1,
    fmacs_float16=4,
    clock_hz=0.85e9,  # SDK examples and HPDC 2024; WaferLLM (OSDI 2025) counts at 1.1e9
    power_watts=22_800.0,
    idle_watts=16_100.0,  # same source
)

# WSE-3: 900,000 cores, 44 GB, 5 nm, eight float16 lanes (Hot Chips 36). The compiler's grid is
# 762 x 1172; the usable rectangle follows from it by WSE-2's rule. Power: of the system, as quoted
# in the press; no measurement is published.
WSE3 = Machine(
    name="WSE-3",
    system="CS-3",
    grid_height=762,
    grid_width=1172,
    usable_height=755,
    usable_width=1170,
    cores=970_000,  # of which 900,000 are in use: "100x Defect Tolerance", the vendor's blog, 2025
    fmacs_float32=1,
    fmacs_float16=8,
    clock_hz=0.85e9,  # gives the 1.52 PFLOP/s float32 roof of the ASPLOS 2026 paper
    power_watts=23_000.0,
)

# NVIDIA's data sheets for the SXM boards, dense figures; level-2 caches by its white papers of the
# A100 and the H100 architecture. A chip's NVLinks
# together are one link to a switch. A launch is one from a CUDA graph: kernels of 2.9 us came every
# 3.4 us (A. Gray, "Getting Started with CUDA Graphs", NVIDIA, 2019, on a V100).
_GRAPH_LAUNCH = 0.5e-6
A100 = Accelerator(
    name="A100 SXM 80 GB",
    kind="a100",
    bfloat16_flops=312 * TERA,
    float32_flops=19.5 * TERA,
    memory_bytes=80 * GB,
    memory_bytes_per_second=2.039 * TERA,
    cache_bytes=40 * MIB,
    launch_seconds=_GRAPH_LAUNCH,
    power_watts=400.0,
    link_bytes_per_second=300.0 * GB,
)
H100 = Accelerator(
    name="H100 SXM",
    kind="h100",
    bfloat16_flops=989.4 * TERA,
    float32_flops=66.9 * TERA,
    memory_bytes=80 * GB,
    memory_bytes_per_second=3.35 * TERA,
    cache_bytes=50 * MIB,
    launch_seconds=_GRAPH_LAUNCH,
    power_watts=700.0,
    link_bytes_per_second=450.0 * GB,
)
H200 = Accelerator(
    name="H200 SXM",
    kind="h200",
    bfloat16_flops=989.4 * TERA,
    float32_flops=66.9 * TERA,
    memory_bytes=141 * GB,
    memory_bytes_per_second=4.8 * TERA,
    cache_bytes=50 * MIB,
    launch_seconds=_GRAPH_LAUNCH,
    power_watts=700.0,
    link_bytes_per_second=450.0 * GB,
)
# Google Cloud's documentation of each TPU (system architecture), read in November 2026; JAX calls
# v5e "TPU v5 lite", v6e "TPU v6 lite" and v5p "TPU v5". The vector memory by the documentation of
# Pallas. A program's loops run on the chip, so that a step launches nothing. Links: the published
# bandwidth of a chip counts both directions of all its ports, four on v5e and v6e, six on v5p and
# TPU7x. The clock follows from the peak: an MXU of 128 x 128 (256 x 256 from v6e on) multiplies and
# adds once a cell and cycle, and four of them a core make 1.5 and 1.75 GHz. From v6e on a core has
# two, and the clock would be 3.5 and 4.4 GHz: so a cell is taken to do it twice a cycle.
TPU_V5E = Accelerator(
    name="TPU v5e",
    kind="tpu v5 lite",
    bfloat16_flops=197 * TERA,
    float32_flops=None,
    memory_bytes=16 * GIB,
    memory_bytes_per_second=0.819 * TERA,
    cache_bytes=128 * MIB,
    launch_seconds=0.0,
    power_watts=None,
    link_bytes_per_second=50.0 * GB,
    clock_hz=1.5e9,
)
TPU_V6E = Accelerator(
    name="TPU v6e",
    kind="tpu v6 lite",
    bfloat16_flops=918 * TERA,
    float32_flops=None,
    memory_bytes=32 * GIB,
    memory_bytes_per_second=1.64 * TERA,
    cache_bytes=128 * MIB,
    launch_seconds=0.0,
    power_watts=None,
    link_bytes_per_second=100.0 * GB,
    clock_hz=1.75e9,
)
TPU_V5P = Accelerator(
    name="TPU v5p",
    kind="tpu v5",
    bfloat16_flops=459 * TERA,
    float32_flops=None,
    memory_bytes=95 * GIB,
    memory_bytes_per_second=2.765 * TERA,
    cache_bytes=2 * 64 * MIB,
    launch_seconds=0.0,
    power_watts=None,
    link_bytes_per_second=100.0 * GB,
    clock_hz=1.75e9,
)
# JAX shows a chip as two devices; the figures are of one of them.
TPU_7X = Accelerator(
    name="half a TPU7x",
    kind="tpu7x",
    bfloat16_flops=2307 / 2 * TERA,
    float32_flops=None,
    memory_bytes=192 * GIB // 2,
    memory_bytes_per_second=7.38 / 2 * TERA,
    cache_bytes=64 * MIB,
    launch_seconds=0.0,
    power_watts=None,
    link_bytes_per_second=100.0 * GB,
    clock_hz=2.2e9,
)

MACHINES = (WSE1, WSE2, WSE3)
# Systems of several wafers, by name. Andromeda: N. Dey et al., "Cerebras-GPT", 2023.
CLUSTERS = {"Andromeda": (WSE2, 16)}
ACCELERATORS = (A100, H100, H200, TPU_V5E, TPU_V6E, TPU_V5P, TPU_7X)


def accelerator(device_kind: str) -> Accelerator | None:
    """The accelerator with JAX's name `device_kind`; None if it is not listed here.

    Args:
      device_kind: such as "NVIDIA H100 80GB HBM3" or "TPU v5 lite".
    """
    named = [chip for chip in ACCELERATORS if chip.kind in device_kind.lower()]
    return max(named, key=lambda chip: len(chip.kind), default=None)  # "tpu v5" is in "tpu v5 lite"


def check_clock(name: str, clock_hz: float) -> None:
    """Raises ValueError unless a clock is a number from 1 Hz to 1,000 GHz.

    Args:
      name: the argument, for the message.
      clock_hz: cycles a second.
    """
    is_number = isinstance(clock_hz, numbers.Real) and not isinstance(clock_hz, bool)
    if not is_number or not 1 <= clock_hz <= _FASTEST_HZ:  # NaN is not
        raise ValueError(f"{name}={clock_hz!r} must be a number from 1 to 1e12, in Hz")


def clock_from_ghz(clock: float | None) -> float | None:
    """The clock that a flag `--clock` gives in GHz, in Hz; None stays None.

    Raises:
      ValueError: it is not from 1e-9 (1 Hz) to 1,000.
    """
    if clock is None:
        return None
    if not 1 <= clock * 1e9 <= _FASTEST_HZ:
        raise ValueError(f"clock={clock!r} must be a number from 1e-9 to 1,000, in GHz")
    return clock * 1e9
