"""Old paths of modules and names: importing one raises ImportError with the new path.

To be removed after 0.2.
"""

import sys
from collections.abc import Callable, Iterable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Modules by their folders, as "old_name:new_name", or "name" if only the folder has changed.
_FABRIC = "algorithms:choice chain cost k_tree line operation optimal ring star tree two_phase"
_MATMUL = (
    "allgather cannon choose:choice collective:overlapped epilogue explain_matmul:explain gemv "
    "over_wafers:replicated panels shares stationary summa tile_product:tile"
)
_ATTENTION = (
    "attention_operands:operands attention_plan:plan balance:kv_balance cache:kv_cache "
    "cache_rows:kv_rows decode ring tile_attention:tile tile_gradients tile_heads:heads "
    "tile_vendor:vendor ulysses visibility:mask zigzag"
)
_STENCIL = (
    "adjoint boundary checkpoints:remat differences:finite_differences finite:nan_check halo "
    "lines:geometry message:exchange neighbors:exchange once:cpu_fusion plan planning:plan "
    "points:sources stepping:steps"
)
_LINKS = "crossings loads placed:around_defects roots trees"
_WAFER = (
    "adopted:on_devices axes context emulation:launch grid:launch host_memory identity:program "
    "layout placement readings:program"
)
_PLACEMENT = "devices:failed_devices harvest:yields held:frozen_array machines:place"


def _moves(old: str, new: str, names: str) -> dict[str, str]:
    return {before: f"{new}.{after}" for before, after in _pairs(old, names)}


def _pairs(old: str, names: str) -> list[tuple[str, str]]:
    pairs = (name.partition(":") for name in names.split())
    return [(f"{old}.{before}", after or before) for before, _, after in pairs]


# Old path -> new path. The modules below a path moved with it, unless they are here themselves.
MOVED = {
    **_moves("wsekern", "wsekern.wafer", _WAFER),
    **_moves("wsekern.placement", "wsekern.wafer.placement", _PLACEMENT),
    "wsekern.placement.regions": "wsekern.wafer.regions",
    "wsekern.placement.spread": "wsekern.wafer.virtual",
    **_moves("wsekern.fabric", "wsekern.fabric.reductions", _FABRIC),
    "wsekern.fabric.axis": "wsekern.fabric.jax_collectives",
    "wsekern.fabric.blocks": "wsekern.fabric.across_devices",
    "wsekern.fabric.multicast": "wsekern.fabric.flood",
    **_moves("wsekern.kernels", "wsekern.kernels.matmul", _MATMUL),
    **_moves("wsekern.kernels", "wsekern.kernels.attention", _ATTENTION),
    **_moves("wsekern.kernels", "wsekern.kernels.stencil", _STENCIL),
    **_moves("wsekern.kernels", "wsekern.kernels.experts", "grouped:grouped_matmul routing"),
    **_moves(
        "wsekern.kernels", "wsekern.kernels.dense", "embedding loss:cross_entropy norm rotary"
    ),
    "wsekern.kernels.local": "wsekern.wafer.program",
    **_moves("wsekern.estimator", "wsekern.estimator.links", _LINKS),
    "wsekern.estimator.published": "wsekern.estimator.validation",
    "wsekern.estimator.whole": "wsekern.estimator.relayout",
    "wsekern.pictures": "wsekern.estimator.pictures",
    **_moves("models", "models", "command:arguments running:commands"),
    "models.checkpoints.fields": "models.checkpoints.config_json",
    **_moves("models", "models.families", "gpt2 gpt_oss llama qwen2 qwen3 qwen3_moe"),
    "training.launch": "wsekern.wafer.launch",
    **_moves(
        "training", "training", "lock:run_folder optimiser:optimizer run:loop start:initial_model"
    ),
}

_PRICE = "wsekern.estimator.links.price"
_POINTS = "wsekern.estimator.validation.points"


def _names(old: str, new: str, names: str) -> dict[str, str]:
    return {before: f"from {new} import {after}" for before, after in _pairs(old, names)}


# Old path of a name -> how to import it now. The module that it stood in still has its path.
NAMES = {
    **_names("wsekern.wafer", "wsekern.wafer.wafer", "TILED"),
    **_names("wsekern.kernels.experts", "wsekern.kernels.experts.feed_forward", "Weights Biases"),
    **_names("wsekern.kernels.matmul", "wsekern.kernels.matmul.signature", "Algorithm"),
    **_names("wsekern.kernels.matmul", "wsekern.kernels.matmul.signature", "Right:Matrix"),
    **_names("wsekern.estimator.links", _PRICE, "Move:PricedMove of_equation:price_move"),
    **_names("wsekern.estimator.links", _PRICE, "axes_of root_of reduction:price_reduction"),
    **_names("wsekern.estimator.validation", _POINTS, "COUNTED FITTED POINTS Row:PredictedPoint"),
    **_names("wsekern.estimator.validation", _POINTS, "Validation fit left_out:cross_validate"),
    **_names("wsekern.estimator.validation", _POINTS, "read:read_points validate"),
    **_names(
        "models.planning.plan",
        "models.planning.plan",
        "Plan:DeploymentPlan scaling:scale_out",
    ),
    **_names(
        "training.config",
        "training.config",
        "differences:config_differences load:load_config resolved:resolve_config save:save_config",
    ),
    **_names("training.programs", "training.plan", "Plan:RunPlan make_plan"),
    **_names("benchmarks.harness", "wsekern.wafer.launch", "parse_grid"),
    **_names(
        "benchmarks.harness",
        "benchmarks.harness",
        "Compiled:CompiledProgram Result:Timing compiled:compile_program",
    ),
}


def moved_names(module: str) -> Callable[[str], Any]:
    """A `__getattr__` for `module`, which is no package: an old name raises ImportError.

    Of a package, `from package import name` asks for a module of that name, and so the finder
    below.
    """

    def old_name(name: str) -> Any:
        _raise_if_moved(f"{module}.{name}")
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return old_name


def _raise_if_moved(name: str) -> None:
    if name in NAMES:
        raise ImportError(f"{name} has moved: {NAMES[name]}", name=name)


class _Signpost:
    """The last finder that Python asks. It finds no module; it names the new path of an old one."""

    @staticmethod
    def find_spec(
        name: str, path: Iterable[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        _raise_if_moved(name)
        if name not in MOVED:
            return None
        # Python imports a folder before the modules in it, so that only the folder's error is
        # seen. It therefore names the modules that went elsewhere.
        elsewhere = [f"{old} is now {MOVED[old]}" for old in MOVED if old.startswith(f"{name}.")]
        # Not ModuleNotFoundError: `from package import old` would hide its message.
        message = "; ".join([f"{name} has moved: import {MOVED[name]}", *elsewhere])
        raise ImportError(message, name=name)


def put_up_signposts() -> None:
    """Makes imports of old paths name the new one. It may be called again: one finder is enough."""
    if _Signpost not in sys.meta_path:
        sys.meta_path.append(_Signpost)
