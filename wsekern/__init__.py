"""Kernels for a wafer-scale engine, seen by JAX as a 2D mesh of PEs.

`import wsekern as wk`. This package imports none of the folders above it.

Sizes are named once, here: M K N of a matrix product; B T S N K H of attention (batch, query
length, key length, heads, key-value heads, head size). One PE's tile of them is Mt, Kt, Nt, ...

Names are loaded when first used, so that `import wsekern` costs nothing and the number of emulated
devices can still be set.
"""

import importlib
from typing import TYPE_CHECKING

from wsekern.moved import put_up_signposts

if TYPE_CHECKING:
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
    from wsekern.hardware import TPU_V5E as TPU_V5E
    from wsekern.hardware import WSE1 as WSE1
    from wsekern.hardware import WSE2 as WSE2
    from wsekern.hardware import WSE3 as WSE3
    from wsekern.kernels.attention.attention import attention as attention
    from wsekern.kernels.attention.decode import decode_attention as decode_attention
    from wsekern.kernels.attention.kv_cache import KVCache as KVCache
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
    from wsekern.wafer.host_memory import Memory as Memory
    from wsekern.wafer.host_memory import memory as memory
    from wsekern.wafer.launch import emulate_devices as emulate_devices
    from wsekern.wafer.placement.defects import Defects as Defects
    from wsekern.wafer.wafer import Wafer as Wafer

_HOMES = {
    "emulate_devices": "wafer.launch",
    "A100": "hardware",
    "H100": "hardware",
    "H200": "hardware",
    "TPU_V5E": "hardware",
    "WSE1": "hardware",
    "WSE2": "hardware",
    "WSE3": "hardware",
    "Defects": "wafer.placement.defects",
    "Estimate": "estimator.result",
    "KVCache": "kernels.attention.kv_cache",
    "Memory": "wafer.host_memory",
    "Traffic": "estimator.traffic",
    "Wafer": "wafer.wafer",
    "attention": "kernels.attention.attention",
    "bicgstab": "solvers.bicgstab",
    "cg": "solvers.conjugate_gradient",
    "check_time_step": "kernels.stencil.finite_differences",
    "cross_entropy": "kernels.dense.cross_entropy",
    "decode_attention": "kernels.attention.decode",
    "difference_coefficients": "kernels.stencil.finite_differences",
    "diffusion_limit": "kernels.stencil.finite_differences",
    "embedding": "kernels.dense.embedding",
    "estimate": "estimator.estimate",
    "experts": "kernels.experts.experts",
    "load_balance_loss": "kernels.experts.routing",
    "explain_matmul": "kernels.matmul.explain",
    "gemv": "kernels.matmul.gemv",
    "crop": "kernels.stencil.halo",
    "halo_exchange": "kernels.stencil.halo",
    "halo_tile": "kernels.stencil.halo",
    "jacobi": "solvers.jacobi",
    "layer_norm": "kernels.dense.norm",
    "matmul": "kernels.matmul.matmul",
    "memory": "wafer.host_memory",
    "multigrid": "solvers.multigrid",
    "rms_norm": "kernels.dense.norm",
    "Receivers": "kernels.stencil.sources",
    "Solution": "solvers.solution",
    "Sources": "kernels.stencil.sources",
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
__all__ = sorted(_HOMES)
put_up_signposts()


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'wsekern' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"wsekern.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__():
    return __all__
