"""Kernels for a wafer-scale engine, which JAX sees as a 2D mesh of PEs.

    import jax.numpy as jnp
    import wsekern as wk

    wafer = wk.Wafer.devices(height=2, width=4)  # or Wafer.of(mesh, ...), .virtual, .abstract
    with wafer:
        c = wk.matmul(a, b)  # whole arrays in and out; under jit and jax.grad too
    print(wk.estimate(wk.matmul, a, b, wafer=wk.Wafer.abstract(wk.WSE3)))

The names, by what they are for:

- the machine: `Wafer`; `WSE1`, `WSE2`, `WSE3` (each a `Machine`); `A100`, `H100`, `H200`,
  `TPU_V5E`, `TPU_V5P`, `TPU_V6E`, `TPU_7X` (each an `Accelerator`); `emulate_devices`, `memory`,
  `Defects`, `Placement`;
- models: `matmul`, `gemv`, `attention`, `decode_attention`, `KVCache`, `paged_attention`,
  `KVPages`, `experts`, `load_balance_loss`, `embedding`, `rotary`, `rms_norm`, `layer_norm`,
  `cross_entropy`;
- fields on a grid: `stencil`, `halo_exchange`, `Sources`, `Receivers`, the limits on a time step;
- linear systems: `cg`, `bicgstab`, `jacobi`, `multigrid`;
- costs: `estimate` (an `Estimate`), `traffic` (a `Traffic`), `explain_matmul` (an `Explanation`),
  and pictures: `roofline`, `scaling`, `wafer_map`, `terminal_map`;
- accelerators, present or not: `Wafer.topology`, `compile` (a `Compilation`);
- kernels of your own: `fabric` (moves between PEs), `layout` (specs, padding, cropping).

Sizes have the same letters everywhere: M K N of a matrix product; B T S N K H of attention (batch,
query length, key length, heads, key-value heads, head size). A PE's tile of them is Mt, Kt, Nt, ...

Names are loaded when first used. `import wsekern` loads no jax, so that `emulate_devices` can still
set the number of CPU devices afterwards. This package imports none of the folders above it.
"""

from typing import TYPE_CHECKING

from wsekern.moved import put_up_signposts
from wsekern.public_names import lazy_names

if TYPE_CHECKING:
    from wsekern import fabric as fabric
    from wsekern.compiler.compile import compile as compile
    from wsekern.compiler.result import Compilation as Compilation
    from wsekern.estimator.estimate import estimate as estimate
    from wsekern.estimator.pictures.roofline import roofline as roofline
    from wsekern.estimator.pictures.scaling import scaling as scaling
    from wsekern.estimator.pictures.terminal import terminal_map as terminal_map
    from wsekern.estimator.pictures.wafer_map import wafer_map as wafer_map
    from wsekern.estimator.result import Estimate as Estimate
    from wsekern.estimator.traffic import Traffic as Traffic
    from wsekern.estimator.traffic import traffic as traffic
    from wsekern.hardware import A100 as A100
    from wsekern.hardware import H100 as H100
    from wsekern.hardware import H200 as H200
    from wsekern.hardware import TPU_7X as TPU_7X
    from wsekern.hardware import TPU_V5E as TPU_V5E
    from wsekern.hardware import TPU_V5P as TPU_V5P
    from wsekern.hardware import TPU_V6E as TPU_V6E
    from wsekern.hardware import WSE1 as WSE1
    from wsekern.hardware import WSE2 as WSE2
    from wsekern.hardware import WSE3 as WSE3
    from wsekern.hardware import Accelerator as Accelerator
    from wsekern.hardware import Machine as Machine
    from wsekern.kernels.attention.attention import attention as attention
    from wsekern.kernels.attention.decode import decode_attention as decode_attention
    from wsekern.kernels.attention.kv_cache import KVCache as KVCache
    from wsekern.kernels.attention.pages import KVPages as KVPages
    from wsekern.kernels.attention.pages import paged_attention as paged_attention
    from wsekern.kernels.dense.cross_entropy import cross_entropy as cross_entropy
    from wsekern.kernels.dense.embedding import embedding as embedding
    from wsekern.kernels.dense.norm import layer_norm as layer_norm
    from wsekern.kernels.dense.norm import rms_norm as rms_norm
    from wsekern.kernels.dense.rotary import rotary as rotary
    from wsekern.kernels.experts.experts import experts as experts
    from wsekern.kernels.experts.routing import load_balance_loss as load_balance_loss
    from wsekern.kernels.matmul.explain import explain_matmul as explain_matmul
    from wsekern.kernels.matmul.gemv import gemv as gemv
    from wsekern.kernels.matmul.matmul import matmul as matmul
    from wsekern.kernels.stencil.finite_differences import check_time_step as check_time_step
    from wsekern.kernels.stencil.finite_differences import (
        difference_coefficients as difference_coefficients,
    )
    from wsekern.kernels.stencil.finite_differences import diffusion_limit as diffusion_limit
    from wsekern.kernels.stencil.finite_differences import wave_limit as wave_limit
    from wsekern.kernels.stencil.halo import crop as crop
    from wsekern.kernels.stencil.halo import halo_exchange as halo_exchange
    from wsekern.kernels.stencil.halo import halo_tile as halo_tile
    from wsekern.kernels.stencil.sources import Receivers as Receivers
    from wsekern.kernels.stencil.sources import Sources as Sources
    from wsekern.kernels.stencil.stencil import stencil as stencil
    from wsekern.kernels.stencil.stencil import stencil_tile as stencil_tile
    from wsekern.solvers.bicgstab import bicgstab as bicgstab
    from wsekern.solvers.conjugate_gradient import cg as cg
    from wsekern.solvers.jacobi import jacobi as jacobi
    from wsekern.solvers.multigrid import multigrid as multigrid
    from wsekern.solvers.multigrid import v_cycle as v_cycle
    from wsekern.solvers.solution import Solution as Solution
    from wsekern.wafer import layout as layout
    from wsekern.wafer.explanation import Explanation as Explanation
    from wsekern.wafer.host_memory import Memory as Memory
    from wsekern.wafer.host_memory import memory as memory
    from wsekern.wafer.launch import emulate_devices as emulate_devices
    from wsekern.wafer.placement.defects import Defects as Defects
    from wsekern.wafer.placement.place import Placement as Placement
    from wsekern.wafer.wafer import Wafer as Wafer

# Public name -> the module below `wsekern` that defines it. Type checkers read the block above.
_HOMES = {
    "A100": "hardware",
    "Accelerator": "hardware",
    "Compilation": "compiler.result",
    "Defects": "wafer.placement.defects",
    "Estimate": "estimator.result",
    "Explanation": "wafer.explanation",
    "H100": "hardware",
    "H200": "hardware",
    "KVCache": "kernels.attention.kv_cache",
    "KVPages": "kernels.attention.pages",
    "Machine": "hardware",
    "Memory": "wafer.host_memory",
    "Placement": "wafer.placement.place",
    "Receivers": "kernels.stencil.sources",
    "Solution": "solvers.solution",
    "Sources": "kernels.stencil.sources",
    "TPU_7X": "hardware",
    "TPU_V5E": "hardware",
    "TPU_V5P": "hardware",
    "TPU_V6E": "hardware",
    "Traffic": "estimator.traffic",
    "WSE1": "hardware",
    "WSE2": "hardware",
    "WSE3": "hardware",
    "Wafer": "wafer.wafer",
    "attention": "kernels.attention.attention",
    "bicgstab": "solvers.bicgstab",
    "cg": "solvers.conjugate_gradient",
    "check_time_step": "kernels.stencil.finite_differences",
    "compile": "compiler.compile",
    "crop": "kernels.stencil.halo",
    "cross_entropy": "kernels.dense.cross_entropy",
    "decode_attention": "kernels.attention.decode",
    "difference_coefficients": "kernels.stencil.finite_differences",
    "diffusion_limit": "kernels.stencil.finite_differences",
    "embedding": "kernels.dense.embedding",
    "emulate_devices": "wafer.launch",
    "estimate": "estimator.estimate",
    "experts": "kernels.experts.experts",
    "explain_matmul": "kernels.matmul.explain",
    "gemv": "kernels.matmul.gemv",
    "halo_exchange": "kernels.stencil.halo",
    "halo_tile": "kernels.stencil.halo",
    "jacobi": "solvers.jacobi",
    "layer_norm": "kernels.dense.norm",
    "load_balance_loss": "kernels.experts.routing",
    "matmul": "kernels.matmul.matmul",
    "memory": "wafer.host_memory",
    "multigrid": "solvers.multigrid",
    "paged_attention": "kernels.attention.pages",
    "rms_norm": "kernels.dense.norm",
    "roofline": "estimator.pictures.roofline",
    "rotary": "kernels.dense.rotary",
    "scaling": "estimator.pictures.scaling",
    "stencil": "kernels.stencil.stencil",
    "stencil_tile": "kernels.stencil.stencil",
    "terminal_map": "estimator.pictures.terminal",
    "traffic": "estimator.traffic",
    "v_cycle": "solvers.multigrid",
    "wafer_map": "estimator.pictures.wafer_map",
    "wave_limit": "kernels.stencil.finite_differences",
}
# Public name -> the module that it is.
_MODULES = {"fabric": "fabric", "layout": "wafer.layout"}
__getattr__, __dir__, __all__ = lazy_names(__name__, _HOMES, _MODULES)
put_up_signposts()
