"""Every program of a model on grids whose sides do not divide its sizes."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_checkpoints as tiny
from flax import nnx

import wsekern as wk
from models import generation
from models.decoder import Decoder
from models.presets import find_family
from models.sampling import Sampling
from training.step import evaluation, state_of, train_step

B, T = 6, 16


def refused(jaxpr):
    """What XLA's partitioner does wrong with whole arrays: what stands outside every kernel.

    A reshape that splits or joins a dimension may kill the process. A scatter adds the padding of a
    dimension that does not divide.
    """
    found = []
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "shard_map":
            continue
        operand, result = (
            vs[0].aval.shape if vs else () for vs in (equation.invars, equation.outvars)
        )
        changes = [n for n in operand if n > 1] != [n for n in result if n > 1]
        if name.startswith("scatter") or name == "reshape" and changes:
            lines = str(equation.source_info.traceback).splitlines()
            found.append(
                (name, operand, result, [x for x in lines if "site-packages" not in x][:6])
            )
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            found += refused(inner) if hasattr(inner, "eqns") else []
    return found


def programs(config):
    """Name -> a function and the shapes of its operands, for all that runs on a wafer."""
    graph, params = nnx.split(Decoder.shapes(config))
    optimizer = optax.adamw(1e-3)
    state = jax.eval_shape(functools.partial(state_of, optimizer=optimizer), params)
    tokens = jax.ShapeDtypeStruct((B, T), jnp.int32)
    mask = jax.ShapeDtypeStruct((B, T, T), jnp.bool_)
    numbers = jax.ShapeDtypeStruct((B,), jnp.int32)
    ended = jax.ShapeDtypeStruct((B,), jnp.bool_)
    text = jax.ShapeDtypeStruct((B, 2 * config.context), jnp.int32)
    key, ends = jax.random.key(0), jnp.zeros(1, jnp.int32)
    sampling, wafer = Sampling(temperature=0.8, top_k=5, top_p=0.9), wk.Wafer.devices(2, 3)

    def forward(params, tokens, segments, mask):
        model = nnx.merge(graph, params)
        positions = jnp.zeros((B, T), jnp.int32)
        masked = None if config.sinks else mask
        return model(tokens, positions, segments), model(tokens, mask=masked)

    def generate(params, tokens, lengths):
        state, _ = generation.prefill(
            graph, params, tokens, lengths, key, ends, sampling, 2 * T, wafer
        )
        return generation.decode(graph, params, state, key, ends, sampling, wafer)

    def slide(params, tokens, lengths, ended):
        texts = generation.Texts(tokens=tokens, lengths=lengths, ended=ended)
        return generation._slide(graph, params, texts, key, ends, 5, sampling)

    return {
        "forward": (forward, params, tokens, tokens, mask),
        "step": (train_step(graph, optimizer, 3), state, tokens, tokens),
        "evaluation": (evaluation(graph, 2), params, tokens, tokens),
        "generate": (generate, params, tokens, numbers),
        "slide": (slide, params, text, numbers, ended),
    }


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_no_program_leaves_xla_what_it_partitions_wrongly(name):
    """`wk.layout.reshape` and `wk.layout.tilewise` do it tile by tile."""
    fields = tiny.CONFIGS[name] | {"num_hidden_layers": 2, "n_layer": 2}
    config = find_family(fields).from_fields(fields)
    with wk.Wafer.devices(2, 3):
        for program, (function, *shapes) in programs(config).items():
            jaxpr = jax.make_jaxpr(lambda *args, f=function: f(*args))(*shapes)
            assert refused(jaxpr.jaxpr) == [], program


def test_the_search_finds_what_it_should():
    @jax.jit
    def program(x):
        x = jax.lax.map(lambda row: row.reshape(2, 3).sum(0), x)
        return jax.grad(lambda x: x[jnp.arange(3)].sum())(x)

    names = [name for name, *_ in refused(jax.make_jaxpr(program)(np.ones((4, 6))).jaxpr)]
    assert names == ["reshape", "scatter-add"]


PROGRAM = """
import wsekern as wk
wk.emulate_devices(6)
import jax, jax.numpy as jnp, numpy as np, optax
from flax import nnx
import models
from models.config import DecoderConfig, ExpertsConfig
from sharding.state import initialize, lay_out, logical
from training.step import state_of, train_step

sizes = dict(vocab=37, d_model=20, d_ff=28, layers=2, head_size=6, context=15)
experts = ExpertsConfig(count=5, chosen=2, d_ff=10)
configs = [
    DecoderConfig(**sizes, heads=4, kv_heads=4, tied=True),
    DecoderConfig(**sizes, heads=8, kv_heads=2, windows=(4, None), sinks=True, experts=experts,
                  sparse_layers=(True, False), biases=("qkv", "out")),
]
tokens = np.arange(4 * 7).reshape(4, 7) % 37
optimizer, wafer = optax.sgd(0.1), wk.Wafer.devices(2, 3)
for config in configs:
    graph, params = nnx.split(models.Decoder(config, rngs=nnx.Rngs(0)))

    def train(wafer):
        state = initialize(lambda: state_of(jax.tree.map(jnp.asarray, params), optimizer), wafer)
        step = jax.jit(train_step(graph, optimizer, 2), out_shardings=(lay_out(state, wafer), None))
        state, metrics = step(state, tokens, tokens[:, ::-1])
        return [metrics, logical(state["params"])]

    def text():
        model, options = nnx.merge(graph, params), dict(temperature=1.0, key=jax.random.key(1))
        return models.generate(model, tokens[:3], max_new_tokens=10, lengths=[3, 7, 1], **options)

    alone = train(None), text()
    with wafer:
        there = train(wafer), text()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), alone[0], there[0])
    np.testing.assert_array_equal(alone[1], there[1])
"""


@pytest.mark.slow
def test_models_train_and_generate_on_a_grid_that_divides_nothing():
    """In a process of its own: what goes wrong here kills it."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
