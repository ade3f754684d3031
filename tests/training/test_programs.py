"""Plans of large models on wafers that are not there: shapes, bytes and price of a step."""

import jax
import jax.numpy as jnp
import pytest

import wsekern as wk
from models.presets import find_preset
from sharding.explain import explain_state
from training.config import TrainingConfig
from training.plan import make_plan
from training.step import train_step


@pytest.mark.parametrize(("height", "width"), [(2, 4), (16, 16)])
@pytest.mark.parametrize("name", ["llama3.3-70b", "qwen3-235b-a22b", "gpt-oss-120b"])
def test_large_models_train_on_a_wafer_that_is_not_there(name, height, width):
    """Shapes only: one step, and the bytes of weights and moments on each device."""
    wafer = wk.Wafer.abstract(wk.WSE3, height, width)
    config = TrainingConfig(dtype="bfloat16", remat=True, batch=16, context=512)
    plan = make_plan(config, find_preset(name), wafer)
    tokens = jax.ShapeDtypeStruct((16, 512), jnp.int32)
    with wafer:
        step = train_step(plan.graph, plan.optimizer)
        after, metrics = jax.eval_shape(step, plan.shapes, tokens, tokens)
    assert metrics["loss"].shape == ()
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, plan.shapes)
    bytes_per_device = sum(row.bytes_per_device for row in explain_state(plan.shapes, wafer))
    parts = (
        12 * sum(row.size for row in explain_state(plan.shapes["params"], wafer)) / (height * width)
    )
    assert parts <= bytes_per_device < 1.01 * parts


def test_a_step_of_a_large_model_is_priced_on_a_whole_wafer():
    """All 80 layers, at the cost of walking one: no weight is made, no PE is walked."""
    wafer = wk.Wafer.abstract(wk.WSE3)
    config = TrainingConfig(dtype="bfloat16", remat=True, batch=1, context=1024)
    plan = make_plan(config, find_preset("llama3.3-70b"), wafer)
    tokens = jax.ShapeDtypeStruct((1, 1024), jnp.int32)
    with wafer:
        step = train_step(plan.graph, plan.optimizer)
    e = wk.estimate(step, plan.shapes, tokens, tokens, wafer=wafer)
    # Six FLOPs a parameter and token, two more for recomputed layers, and padding.
    assert e.flops > 8 * 70e9 * 1024
    assert 0 < e.busy["compute"] <= e.cycles and not e.fits
    assert not set(e.unknown) & {"dot_general", "scan"}
