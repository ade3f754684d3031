"""The model against published measurements, and the published programs against plain ones."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest

import wsekern as wk
from wsekern.estimator.cost import Constants
from wsekern.estimator.pictures.published import plot_published
from wsekern.estimator.validation import gemm, points, prefill, programs, waferllm, wave25

ROOT = pathlib.Path(__file__).parents[4]


@pytest.fixture(scope="module")
def validation():
    return points.validate()


def test_predictions_are_near_the_measurements(validation):
    errors = [abs(row.error) for row in validation.counted_rows]
    assert len(errors) == 9
    assert np.mean(errors) < 0.05 and max(errors) < 0.1
    assert all(abs(row.error) < 0.003 for row in validation.rows if row.fitted)
    assert len(dataclasses.fields(Constants)) == len(points.FITTED) <= 6


def test_the_page_shows_what_the_command_predicts(validation):
    """The table of docs/estimate.md, digit for digit, and its averages, there and elsewhere."""
    page = (ROOT / "docs" / "estimate.md").read_text(encoding="utf-8")
    table = page.partition("| point | measured |")[2].partition("\n\n")[0].splitlines()[2:]
    assert len(table) == len(validation.rows)
    for line, row in zip(table, validation.rows, strict=True):
        _, measured, shown, error, use = (cell.strip() for cell in line.split("|")[1:-1])
        assert float(measured.split()[0].replace(",", "")) == row.point.value
        digits = len(shown.partition(".")[2])
        assert shown.replace(",", "") == f"{row.predicted:.{digits}f}", line
        assert error == ("" if row.fitted else f"{100 * row.error:+.1f} %"), line
        counted = "" if row in validation.counted_rows else "reported only"
        assert use == ("fitted" if row.fitted else counted), line
    errors = [100 * abs(row.error) for row in validation.counted_rows]
    mean, most = f"{np.mean(errors):.1f} %", f"{max(errors):.1f} %"
    assert f"{mean} on average, {most} at most" in page
    for place in ("README.md", "wsekern/estimator/estimate.py"):
        text = " ".join((ROOT / place).read_text(encoding="utf-8").split())
        assert f"{mean} on average" in text and f"{most} at most" in text, place


def test_the_picture_on_the_page_is_the_one_that_the_command_draws(validation, tmp_path):
    if f"matplotlib=={matplotlib.__version__}" not in (ROOT / "constraints.txt").read_text():
        pytest.skip("another matplotlib sets letters at other places")
    drawn = tmp_path / "predicted.png"
    plot_published(validation, drawn)
    new, old = (plt.imread(path)[..., :3] for path in (drawn, ROOT / "docs" / "predicted.png"))
    assert new.shape == old.shape
    assert abs(new - old).mean() < 1e-3, "draw it anew: wsekern estimate --validate --plot"


def test_orderings_are_the_published_ones(validation):
    predicted = {row.point.id: row.predicted for row in validation.rows}
    decode = [predicted[f"decode-8b-{side}"] for side in (420, 540, 660)]
    prefill = [predicted[f"prefill-8b-{side}"] for side in (480, 600, 720)]
    assert decode == sorted(decode, reverse=True) and prefill == sorted(prefill)
    a = jax.ShapeDtypeStruct((4320, 4320), jnp.float16)
    wafer = wk.Wafer.abstract(wk.WSE2, 720, 720)
    mesh, cannon, summa = (
        wk.estimate(functools.partial(wk.matmul, algorithm=name), a, a, wafer=wafer).cycles
        for name in ("mesh_gemm", "cannon", "summa")
    )
    assert mesh < cannon < summa


def test_a_wider_model_costs_what_its_instructions_cost():
    """Vectors lie along a tile's tokens, so that twice the width is four times the instructions."""
    machine, cycles = wk.WSE2, {}
    for width in (4096, 8192):
        part = programs._prefill(machine, 512, programs.ModelSizes(1, width, 2 * width), 4096)
        assert part.vectors_along_rows
        longer = part._replace(vectors_along_rows=False)
        cycles[width] = part.cycles(Constants()), longer.cycles(Constants())
    assert cycles[4096][0] < 1.1 * cycles[4096][1] and cycles[8192][0] > 1.2 * cycles[8192][1]
    assert 2.5 < cycles[8192][0] / cycles[4096][0] < 4


def test_a_product_with_a_vector_is_predicted_as_its_benchmark_times_it(validation):
    (row,) = [row for row in validation.rows if row.point.id == "gemv-16k"]
    assert abs(row.error) < 0.05  # nothing is fitted on it


def test_repeated_products_with_a_vector_equal_a_plain_one():
    wafer = wk.Wafer.virtual(wk.WSE2, 3, 3)
    x, w = (jax.random.normal(jax.random.key(k), s) for k, s in enumerate(((1, 6), (6, 9))))
    run = jax.jit(functools.partial(waferllm.vector_products, repeats=2, wafer=wafer))
    np.testing.assert_allclose(run(x, w), x @ w, rtol=1e-5)


def test_a_table_of_ones_own_is_predicted(tmp_path, validation):
    text = points.POINTS.read_text().splitlines()
    one = next(line for line in text if line.startswith("decode-8b-420"))
    table = tmp_path / "mine.csv"
    odd = "fft,WSE-2,FFT of something,8x8,,time,3,us,,mine"
    other = one.replace("decode-8b-420", "mine").replace("LLaMA3-8B", "LLaMA2-13B")
    table.write_text("\n".join([text[0], other, odd]))
    mine = points.validate(table)
    assert [row.point.id for row in mine.rows] == ["mine"] and not mine.rows[0].fitted
    assert mine.rows[0].predicted < validation.rows[0].predicted
    assert "workload 'FFT of something' is none of those" in mine.skipped["fft"]
    (row,) = json.loads(mine.as_json())
    assert row["id"] == "mine" and row["measured"] == 2699.9
    assert row["error"] == pytest.approx(row["predicted"] / row["measured"] - 1)
    assert "left out: fft" in str(mine)


COLUMNS = "id,machine,workload,grid,parameters,quantity,value,unit,clock_ghz,source"


def test_products_are_known_by_their_names(tmp_path):
    """Of any size; where no grid is stated, it is the best one, which is said and not counted."""
    table = tmp_path / "mine.csv"
    table.write_text(
        COLUMNS
        + """
gemv,WSE-2,MeshGEMV 16384 x 16384 fp16,not stated,,time,1.2,us,1.1,paper
same,WSE-2,MeshGEMV 16K x 16K fp16,660x660,,time,1.2,us,1.1,paper
mesh,WSE-2,MeshGEMM 4096 x 4096 fp16,480x480,,time,500,us,1.1,paper
rate,WSE-2,SGEMM fp32 1024 x 1024 x 512,64x64,,rate,1000,GFLOP/s,,paper
time,WSE-2,SGEMM fp32 1024 x 1024 x 512,64x64,,cycles,300000,cycles,,paper
base,WSE-2,dense GEMM fp32 baseline 768 x 768 x 64,16x12,,mean cycles,476866,cycles,,paper
"""
    )
    v = points.validate(table)
    assert not v.skipped
    rows = {row.point.id: row for row in v.rows}
    assert rows["gemv"].predicted == rows["same"].predicted and not rows["same"].note
    assert rows["gemv"].note == "on 660x660, the best grid" and not rows["gemv"].is_counted
    assert "(on 660x660, the best grid; reported only)" in str(v)
    # The products of a prefill of this width, of which each takes as long.
    assert 300 < rows["mesh"].predicted < 700
    flops = 2 * 1024 * 1024 * 512
    assert rows["rate"].predicted == pytest.approx(flops * 0.85 / rows["time"].predicted)
    published = next(p for p in points.read_points(points.POINTS) if p.id == "gemm-fp32-16x12")
    assert rows["base"].predicted == programs.program_of(published).predict()


@pytest.mark.parametrize(
    ("row", "same"),
    [
        ("broadcast of 1000 words along 100 PEs,,", "broadcast of 1000 words along 100 PEs,1x100,"),
        ("Broadcast of 9 words along 7 PEs,unknown,", "broadcast of 9 words along 7 PEs,1x7,"),
        ("MeshGEMV n x n fp16,240x240,n=4096", "MeshGEMV 4096 x 4096 fp16,240x240,"),
        ("MeshGEMV fp16,240x240,N = 4K", "MeshGEMV 4096 x 4096 fp16,240x240,"),
        ("MeshGEMV fp16,240x240,K=480 N=960", "MeshGEMV 480 x 960 fp16,240x240,"),
        ("MeshGEMV fp16,240x240,M=480; N=960", "MeshGEMV 480 x 960 fp16,240x240,"),
        ("SGEMM fp32 n x n x n,64x64,n=1024", "SGEMM fp32 1024 x 1024 x 1024,64x64,"),
        ("SGEMM fp32 n x n x n,64x64,M=N=K=1024", "SGEMM fp32 1024 x 1024 x 1024,64x64,"),
        ("SGEMM fp32,64x64,M=512 N=256 K=1024", "SGEMM fp32 512 x 1024 x 256,64x64,"),
        ("MeshGEMM,64x64,M=512 N=256 K=1024; fp16", "MeshGEMM 512 x 1024 x 256 fp16,64x64,"),
        (
            "dense GEMM fp32 768 x 768 x 64,16x12,",
            "dense GEMM fp32 baseline,16x12,N=768 K=768 M=64",
        ),
        ("dense GEMM fp32,16x12,M=64 N=768 K=768", "GEMM fp32 baseline 768 x 768 x 64,16x12,"),
    ],
)
def test_sizes_may_be_parameters_and_a_grid_may_be_a_name(tmp_path, row, same):
    table = tmp_path / "mine.csv"
    lines = [f"{n},WSE-2,{text},time,1,us,1.1,me" for n, text in enumerate((row, same))]
    table.write_text("\n".join([COLUMNS, *lines]))
    v = points.validate(table)
    assert not v.skipped and v.rows[0].predicted == v.rows[1].predicted


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("x,WSE-2,foo,4x4,,time,1,s,,me", "workload 'foo' is none of those"),
        ("x,WSE-9,SGEMM fp32 8 x 8,4x4,,time,1,s,,me", "machine 'WSE-9' is not one of"),
        ("x,WSE-2,SGEMM fp32,4x4,,time,1,s,,me", "has no sizes like 4096 x 4096"),
        ("x,WSE-2,SGEMM n x n,4x4,K=8 M=4,time,1,s,,me", "give none of n=4096 or M=4096 K=4096"),
        ("x,WSE-2,broadcast of 9 words,,,time,1,s,,me", "have nothing like 'along"),
        ("x,WSE-2,MeshGEMV 8 x 4 x 8,4x4,,time,1,s,,me", "has 3 sizes, it needs 2"),
        ("x,WSE-2,SGEMM fp32 8 x 8,4x4,,time,1,ft,,me", "unit 'ft' is not one of"),
        ("x,WSE-2,MeshGEMM 8 x 8,4x5,,time,1,s,,me", "grid '4x5' is not square"),
        ("x,WSE-2,SGEMM fp32 8 x 8,9999x9999,,time,1,s,,me", "9999x9999 PEs do not fit"),
        ("x,WSE-2,SGEMM fp32 8 x 8,4x4,,time,-1,s,,me", "value '-1' is not a positive number"),
        ("x,WSE-2,SGEMM fp32 8 x 8,4x4,,time,1,s,nan,me", "clock_ghz 'nan' is not a positive"),
        ("x,WSE-2,LLaMA3-8B decode,420x420,context 9,latency,1,ms,,me", "is not 'tokens/s'"),
        ("x,WSE-2,LLaMA3-8B decode,420x420,,rate,1,tokens/s,,me", "have no context"),
        ("x", "value '' is not a positive number"),
    ],
)
def test_a_row_that_is_not_known_is_named_and_stops_no_other(tmp_path, row, message):
    table = tmp_path / "mine.csv"
    good = "good,WSE-2,broadcast of 196 words along 4 PEs,1x4,,,201,cycles,,log"
    table.write_text(f"{COLUMNS}\n{row}\n{good}\n")
    v = points.validate(table)
    assert [r.point.id for r in v.rows] == ["good"]
    assert message in v.skipped["x"] and "left out: x: " in str(v)


def test_a_table_without_a_column_is_refused(tmp_path):
    table = tmp_path / "bad.csv"
    table.write_text("id,machine\n")
    with pytest.raises(ValueError, match="there is no column 'workload'"):
        points.validate(table)


@pytest.mark.slow
def test_constants_fitted_on_other_programs_predict_a_kind_within_a_third(validation):
    errors = points.cross_validate()
    assert set(errors) == {"decode", "prefill", "product", "stencil"}
    assert max(errors.values()) < 1 / 3


def test_a_fit_finds_the_constants_that_made_the_points():
    stencils = [p for p in points.read_points(points.POINTS) if p.family == "stencil"]
    traced = [programs.program_of(p) for p in stencils]
    truth = Constants(vector_start=20.0, paired_float32=1.3)
    exact = [
        dataclasses.replace(p, value=g.predict(truth))
        for p, g in zip(stencils, traced, strict=True)
    ]
    fitted = points.fit(exact, traced, trust=1e-3)
    for p, g in zip(exact, traced, strict=True):
        assert g.predict(fitted) == pytest.approx(p.value, rel=5e-3)


def test_the_published_layers_equal_plain_ones():
    wafer = wk.Wafer.virtual(wk.WSE2, 4, 4)
    D, F, S = 8, 16, 12
    rng = np.random.default_rng(0)
    shapes = waferllm.shapes(D, F, jnp.float32)
    w = {n: jnp.asarray(rng.normal(size=s.shape) * 0.3, jnp.float32) for n, s in shapes.items()}
    h, keys, values = (
        jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((1, D), (S, D), (S, D))
    )
    out, k, v = jax.jit(lambda h, w, k, v: waferllm.decode_layer(h, w, k, v, wafer))(
        h, w, keys[None], values[None]
    )
    k, v = k[0], v[0]

    def norm(x, eps=1e-5):
        return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + eps)

    n = norm(h)
    np.testing.assert_allclose(v[-1:], n @ w["value"], atol=1e-5)
    np.testing.assert_array_equal(k[:-1], keys[:-1])
    # The two features that a PE holds are one rotary pair.
    turn = lambda x: x * np.cos(1) + x.reshape(-1, 2)[:, ::-1].reshape(x.shape) * np.sin(1)  # noqa: E731
    q = turn(n @ w["query"])
    np.testing.assert_allclose(k[-1:], turn(n @ w["key"]), atol=1e-5)
    mid = h + jax.nn.softmax(q @ k.T) @ v @ w["out"]
    n = norm(mid)
    want = mid + (jax.nn.silu(n @ w["gate"]) * (n @ w["up"])) @ w["down"]
    np.testing.assert_allclose(out, want, atol=2e-5)
    tokens = jnp.asarray(rng.normal(size=(S, D)), jnp.float32)
    got = jax.jit(lambda h, w: waferllm.prefill_layer(h, w, wafer))(tokens, w)
    step_by_step = jax.jit(lambda h, w: prefill.layer(h, prefill.align_weights(w, wafer), wafer))
    np.testing.assert_allclose(step_by_step(tokens, w), got, atol=2e-5)
    n = norm(tokens, 1e-6)
    mid = tokens + jax.nn.softmax(n @ w["query"] @ (n @ w["key"]).T) @ (n @ w["value"]) @ w["out"]
    n = norm(mid, 1e-6)
    want = mid + (jax.nn.silu(n @ w["gate"]) * (n @ w["up"])) @ w["down"]
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_a_layer_with_grouped_queries_and_no_gate_equals_a_plain_one():
    """With two sequences. A PE holds its part of each group of queries, one group after another."""
    wafer, B, D, F, S, P = wk.Wafer.virtual(wk.WSE2, 4, 4), 2, 8, 16, 12, 4
    rng = np.random.default_rng(0)
    shapes = waferllm.shapes(D, F, jnp.float32, d_query=2 * D, d_kv=D, gated=False)
    assert shapes["query"].shape == (D, 2 * D) and "gate" not in shapes
    w = {n: np.float32(rng.normal(size=s.shape) * 0.3) for n, s in shapes.items()}
    sizes = (B, D), (B, S, D), (B, S, D)
    h, keys, values = (np.float32(rng.normal(size=s)) for s in sizes)
    run = jax.jit(functools.partial(waferllm.decode_layer, wafer=wafer))
    out, k, v = run(h, w, keys, values)

    def norm(x):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)

    turn = lambda x: x * np.cos(1) + x.reshape(-1, 2)[:, ::-1].reshape(x.shape) * np.sin(1)  # noqa: E731
    n = norm(h)
    np.testing.assert_allclose(v[:, -1], n @ w["value"], atol=1e-5)
    q = (n @ w["query"]).reshape(B, P, 2, D // P).transpose(0, 2, 1, 3).reshape(B, 2, D)
    shares = jax.nn.softmax(turn(q) @ k.transpose(0, 2, 1))
    o = np.asarray(shares @ v).reshape(B, 2, P, D // P).transpose(0, 2, 1, 3).reshape(B, 2 * D)
    mid = h + o @ w["out"]
    want = mid + jax.nn.gelu(norm(mid) @ w["up"]) @ w["down"]
    np.testing.assert_allclose(out, want, atol=2e-5)
    logits = jax.jit(lambda h, w: waferllm.head(h, w, wafer))(h, w["up"])
    np.testing.assert_allclose(logits, n @ w["up"], atol=1e-5)


def test_the_published_stencil_and_product_equal_plain_ones():
    wafer = wk.Wafer.virtual(wk.WSE2, 6, 5)
    rng = np.random.default_rng(0)
    u, before, speed = (np.float32(rng.normal(size=(6, 5, 7))) * 0.1 for _ in range(3))
    got = jax.jit(lambda u, b, s: wave25.wave(u, b, s, 2, wafer))(u, before, speed)
    _, weights = wk.difference_coefficients(2, 8)

    def step(u, before):
        around = np.pad(u, 4)
        total = np.zeros_like(u)
        for far, weight in enumerate(weights):
            total += weight * around[far : far + 6, 4:9, 4:11]
            total += weight * around[4:10, far : far + 5, 4:11]
            total += weight * around[4:10, 4:9, far : far + 7]
        return 2 * u - before + speed * total, u

    np.testing.assert_allclose(got, step(*step(u, before))[0], atol=1e-5)
    a, b = (rng.integers(-9, 9, size).astype(np.float32) for size in ((12, 10), (10, 3)))
    np.testing.assert_array_equal(jax.jit(lambda a, b: gemm.dense(a, b, wafer))(a, b)[0], a @ b)
