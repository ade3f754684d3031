"""The pictures of an estimate: the values and names that they show, and what they refuse."""

import functools
import io
import itertools
import json
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.text import Text
from rich.console import Console

import wsekern as wk
from wsekern.estimator.pictures import (
    figure,
    output,
    page,
    published,
    quantities,
    roofline,
    scaling,
    timeline,
    views,
    wafer_map,
)
from wsekern.estimator.validation import points

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def e():
    """Cannon's product on 6 x 10 tiles: shifts, a loop, and a tile product."""
    a = jax.ShapeDtypeStruct((48, 48), jnp.float16)
    wafer = wk.Wafer.abstract(wk.WSE3, 12, 12)
    return wk.estimate(functools.partial(wk.matmul, algorithm="cannon"), a, a, wafer=wafer)


def image_of(figure):
    return figure.axes[0].images[0]


def test_a_map_shows_the_busiest_link_of_each_pe(e):
    most = np.max(list(e.link_words().values()), axis=0)
    figure = e.plot()
    np.testing.assert_array_equal(image_of(figure).get_array(), most)
    assert image_of(figure).get_clim() == (0, most.max())
    assert "12 x 12 PEs" in figure.axes[0].get_title(loc="left")
    north = image_of(wk.wafer_map(e, "N", zoom=(2, 5, 0, 12)))
    np.testing.assert_array_equal(north.get_array(), e.link_words()["N"][2:5])
    assert north.get_extent() == [-0.5, 11.5, 4.5, 1.5]


def test_a_map_of_equal_values_says_so(e):
    memory, busy = (quantities.quantity_of(e, name) for name in ("sram", "busy"))
    assert set(memory.values.flat) == {e.sram_per_pe} and quantities.SAME in memory.note
    assert busy.values.min() >= e.busy["compute"] and quantities.SAME in busy.note


def test_defects_are_blank_and_marked(tmp_path):
    values, defects = np.arange(30.0).reshape(5, 6), np.zeros((5, 6), bool)
    defects[4, 5] = defects[1, 2] = True
    path = tmp_path / "map.png"
    figure = wk.wafer_map(values, defects=defects, label="bytes", path=path)
    shown = image_of(figure).get_array()
    np.testing.assert_array_equal(np.ma.getmaskarray(shown), defects)
    assert image_of(figure).get_clim()[1] == 28  # the largest value of a PE that works
    (marks,) = figure.axes[0].collections
    assert sorted(np.asarray(marks.get_offsets()).tolist()) == [[2, 1], [5, 4]]
    assert figure.axes[0].get_legend_handles_labels()[1] == ["2 defects"]
    assert path.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"what": np.zeros(3)}, r"\(3,\) are not \[height, width\]"),
        (
            {"defects": np.zeros((2, 3))},
            r"defects of shape \(2, 3\) are not of the map's, \(4, 4\)",
        ),
        ({"zoom": (0, 5, 0, 1)}, r"zoom=\(0, 5, 0, 1\) is not .* within 4x4 PEs"),
        ({"path": "map.txt"}, "must end in .png or .svg or .pdf"),
    ],
)
def test_a_map_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        wk.wafer_map(**{"what": np.zeros((4, 4))} | arguments)


def test_an_unknown_quantity_is_refused_with_the_nearest_name(e):
    with pytest.raises(ValueError, match="no quantity 'laod'; did you mean 'load'"):
        wk.wafer_map(e, "laod")


def test_without_matplotlib_it_says_what_to_install(e, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for draw in (e.plot, lambda: e.html(tmp_path / "e.html")):
        with pytest.raises(ImportError, match=r"pip install -e '.\[viz\]'"):
            draw()
    e.timeline(tmp_path / "e.json")  # which needs no matplotlib


def test_a_timeline_is_a_trace_that_viewers_open(e, tmp_path):
    path = tmp_path / "trace.json"
    e.timeline(path)
    trace = json.loads(path.read_text())
    named = {
        v["tid"]: v["args"]["name"] for v in trace["traceEvents"] if v["name"] == "thread_name"
    }
    assert list(named.values())[:5] == ["compute", "link N", "link E", "link S", "link W"]
    (process,) = [v for v in trace["traceEvents"] if v["name"] == "process_name"]
    assert process["ph"] == "M" and process["args"]["name"] == "one PE of WSE-3, 12x12 PEs"
    slices = [v for v in trace["traceEvents"] if v["ph"] == "X"]
    assert len(slices) == len(e.events) and {v["ph"] for v in trace["traceEvents"]} == {"M", "X"}
    for each in slices:
        assert each.keys() == {"ph", "pid", "tid", "ts", "dur", "name", "cat", "args"}
        assert each["pid"] == process["pid"] and each["tid"] in named and each["dur"] >= 0
    assert max(v["ts"] + v["dur"] for v in slices) == pytest.approx(e.seconds * 1e6, rel=1e-3)
    assert [v["name"] for v in slices if v["cat"] == "loop"]


def test_slices_of_a_lane_never_overlap(e):
    slices = [v for v in timeline.trace_events(e)["traceEvents"] if v["ph"] == "X"]
    for tid in {v["tid"] for v in slices}:
        lane = [(round(v["ts"] * 1000), round(v["dur"] * 1000)) for v in slices if v["tid"] == tid]
        assert all(a + length <= b for (a, length), (b, _) in itertools.pairwise(lane)), tid


def test_a_page_has_every_row_and_loads_nothing(e, tmp_path):
    path = tmp_path / "e.html"
    e.html(path, "mine.py:<step>")
    text = path.read_text()
    assert "<h1>mine.py:&lt;step&gt;</h1>" in text
    cells = re.findall(r"<td[^>]*>(.*?)</td>", text)
    for name, line, cycles in e.by_operation:
        assert {name, line, f"{cycles:,.0f}"} <= set(cells)
    for name, value in page.figures(e) + page.assumptions(e):
        assert name in cells and page._escape(value) in cells
    assert text.count("<svg ") == 5 and "currentColor" in text
    loads = re.findall(r"""(?:href|src|action|data)=["']([^"']*)|url\(([^)]*)\)""", text)
    assert loads and all(re.match("data:|#", a or b) for a, b in loads)
    assert not re.search("<script|<link|@import|<iframe|<object", text)
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text


def test_a_page_draws_only_what_there_is_to_see():
    """No map without a word on a link, no timeline without a cycle, no roof without a FLOP."""
    wafer = wk.Wafer.abstract(wk.WSE2, 1, 4)
    a = jax.ShapeDtypeStruct((16, 64), jnp.float32)
    idle = wk.estimate(lambda x: x, a, wafer=wafer)
    text = page.render_page(idle)
    assert text.count("<svg ") == 0 and "There is nothing to draw" in text
    assert "bound by         nothing" in str(idle) and "(busy: )" not in str(idle)
    alone = wk.estimate(lambda x: x + 1.0, a, wafer=wafer)  # a timeline, a roofline, a bar
    assert page.render_page(alone).count("<svg ") == 3
    moved = wk.estimate(lambda x: jnp.roll(x, 1, 1)[:, ::2], a, wafer=wafer)
    assert not moved.flops and page.render_page(moved).count("<svg ") == 4
    with pytest.raises(ValueError, match="no program computes anything"):
        wk.roofline(idle)


def test_a_roofline_has_roofs_and_points_under_them(e, tmp_path):
    wafer, *_ = roofline.roofs({"product": e}, (wk.H100,))
    assert wafer.flops["16 bits"] == 2 * 8 * 144 * e.clock_hz
    assert wafer.bytes_per_second == 24 * 144 * e.clock_hz
    on_wafer, on_chip = roofline.points({"product": e}, (wk.H100,))
    assert on_wafer.estimated and on_wafer.flops == e.flops_per_second < wafer.flops["16 bits"]
    assert on_chip.flops == pytest.approx(e.flops / e.accelerators["H100 SXM"])
    figure = wk.roofline({"product": e}, accelerators=(wk.H100,), path=tmp_path / "roof.svg")
    names = [text.get_text() for text in figure.axes[0].texts]
    assert "WSE-3, 12x12, 16 bits" in names and names.count("product") == 2


def test_a_scaling_plot_has_lines_and_measured_points():
    lines = {"WSE-3": [(1, 10.0), (4, 36.0), (2, 19.0)]}
    figure = wk.scaling(lines, measured={"WSE-3": [(2, 18.0)]}, of="wafers", quantity="tokens/s")
    line, point = figure.axes[0].lines
    np.testing.assert_array_equal(line.get_xydata(), sorted(lines["WSE-3"]))
    np.testing.assert_array_equal(point.get_xydata(), [(2, 18)])
    assert line.get_color() == point.get_markeredgecolor()
    assert figure.axes[0].get_xlabel() == "wafers"
    with pytest.raises(ValueError, match="all positive"):
        wk.scaling({"WSE-3": [(1, 0.0)]})


def test_predictions_are_plotted_against_measurements(tmp_path):
    point = [p for p in points.read_points(points.POINTS) if p.family == "product"]
    rows = [
        points.PredictedPoint(p, 1.1 * p.value, fitted)
        for p, fitted in zip(point, (True, False), strict=True)
    ]
    figure = published.plot_published(points.Validation(rows, {}), tmp_path / "points.png")
    left, right = figure.axes
    drawn = [tuple(xy) for line in left.lines for xy in np.asarray(line.get_xydata())]
    assert all((row.point.value, row.predicted) in drawn for row in rows)
    assert [t.get_text() for t in right.get_yticklabels()] == [row.point.id for row in rows]
    with pytest.raises(ValueError, match="nothing to plot"):
        published.plot_published(points.Validation([], {}))


def printed_lines(what, colors, **arguments):
    text = io.StringIO()
    console = Console(
        file=text, width=80, color_system="truecolor" if colors else None, force_terminal=colors
    )
    wk.terminal_map(what, console=console, **arguments)
    return text.getvalue().splitlines()


def test_a_dot_of_a_terminal_map_is_the_largest_value_of_its_pes():
    values = np.zeros((200, 100))
    values[150, 99] = 5.0
    title, *lines, legend = printed_lines(values, colors=False, label="words")
    assert "rows 0 to 199, columns 0 to 99" in title and legend.endswith("5")
    assert len(lines) == 20 and [line.rstrip()[-1:] for line in lines].count("@") == 1
    assert lines[15].rstrip().endswith("@") and len(lines[15].rstrip()) == 20


def test_a_terminal_map_has_colors_and_defects(e):
    defects = np.zeros((12, 12), bool)
    defects[0, 0] = True
    lines = printed_lines(e, colors=True, defects=defects)
    assert "\x1b[38;2;224;33;138" in lines[1] and lines[1].count("▀") == 24
    assert "defect" in lines[-1] and "words" in lines[-1]


def test_the_legend_of_a_terminal_map_has_plain_numbers():
    for top, said in ((1.12e6, "1,120,000"), (0.25, "0.25"), (768.0, "768")):
        stream = io.StringIO()
        wk.terminal_map(np.full((2, 2), top), console=Console(file=stream, width=80))
        assert stream.getvalue().splitlines()[-1].endswith(f" {said}")


def test_files_are_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "e.json"
    path.write_text("before")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        output.write(path, "after")
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_a_path_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(OSError, match="there is no folder"):
        output.check_writable(tmp_path / "none" / "e.html")
    if pathlib.Path("/proc/self").exists():  # rights say yes to root, the file system says no
        with pytest.raises(OSError, match="no file can be made in '/proc'"):
            output.check_writable("/proc/e.html")
    with pytest.raises(OSError, match="no regular file"):
        output.check_writable(tmp_path)


def test_nothing_loads_matplotlib_before_it_draws():
    """In a process of its own: whatever other tests have loaded does not count."""
    script = """
import sys
import jax
import jax.numpy as jnp
import wsekern as wk
from wsekern.estimator.pictures import page, published, views

a = jax.ShapeDtypeStruct((8, 8), jnp.float32)
e = wk.estimate(lambda x: x + 1.0, a, wafer=wk.Wafer.abstract(wk.WSE2, 2, 2))
assert str(e) and e._repr_html_()
assert "matplotlib" not in sys.modules
assert wk.wafer_map(e) and wk.roofline(e) and wk.scaling({"WSE-2": [(1, 1.0)]})
assert "matplotlib" in sys.modules
assert "matplotlib.pyplot" not in sys.modules
"""
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr


def test_a_figure_is_shown_by_a_notebook_without_a_magic_line(e):
    """As IPython does it where no backend is active: by the method `_repr_png_` of its class."""
    from wsekern.estimator.pictures.notebook import NotebookFigure

    scaled = {"WSE-3": [(1, 10.0), (2, 19.0)]}
    for picture in (e.plot(), wk.wafer_map(e, "busy"), wk.roofline(e), wk.scaling(scaled)):
        assert isinstance(picture, NotebookFigure)
        png = picture._repr_png_()
        assert png.startswith(b"\x89PNG")
        width, height = (int.from_bytes(png[at : at + 4]) for at in (16, 20))
        assert (width, height) == tuple(100 * picture.get_size_inches() // 1)


def test_a_program_with_a_placement_is_drawn_at_its_physical_places():
    """Its PEs lie around faulty ones, and the map shows only the part of the wafer that it has."""
    defects = wk.Defects.random(wk.WSE2, pe_yield=0.9, seed=1)
    wafer = wk.Wafer.abstract(wk.WSE2, 12, 15, defects=defects)
    a = jax.ShapeDtypeStruct((60, 60), jnp.float32)
    e = wk.estimate(wk.matmul, a, a, wafer=wafer)
    assert wafer.placement is not None
    load = quantities.quantity_of(e)
    shown = quantities.on_wafer(e, load)
    assert shown.values.shape == wafer.placement.physical
    np.testing.assert_array_equal(
        shown.values[wafer.placement.rows, wafer.placement.columns], load.values
    )
    assert np.isfinite(shown.values).sum() == 12 * 15
    extent = quantities.extent(e)
    assert extent is not None
    y0, y1, x0, x1 = extent
    assert y1 - y0 >= 12 and x1 - x0 > 15
    assert np.isfinite(shown.values[y0:y1, x0:x1]).sum() == 12 * 15
    axes = wk.wafer_map(e).axes[0]
    assert axes.get_xlim() == (x0 - 0.5, x1 - 0.5)


def test_a_timeline_is_as_busy_as_the_figures_say():
    """Loops whose trips are not walked, and more operations than a timeline keeps one by one."""
    a = jax.ShapeDtypeStruct((480, 480), jnp.float32)
    wafer = wk.Wafer.abstract(wk.WSE3, 12, 12)

    def many(x):
        for _ in range(60):
            x = wk.matmul(x, x, algorithm="mesh_gemm")
        return jnp.tanh(x)

    for function in (functools.partial(wk.matmul, algorithm="mesh_gemm"), many):
        e = wk.estimate(function, *[a] * (1 if function is many else 2), wafer=wafer)
        for lane, busy in e.busy.items():
            drawn = sum(v.share * (v.end - v.start) for v in e.events if v.lane == lane)
            assert drawn == pytest.approx(busy, rel=0.01)
            (whole,) = views.busy_shares(e, lane, np.array([0.0, e.cycles]))
            assert whole == pytest.approx(busy / e.cycles, rel=0.01)
    assert e.busy["compute"] > 0.5 * e.cycles
    quarters = views.busy_shares(e, "compute", np.linspace(0, e.cycles, 5))
    assert quarters.min() > 0.5


def test_events_beyond_those_kept_are_drawn_as_one(monkeypatch):
    monkeypatch.setattr("wsekern.estimator.clocks._EVENTS", 50)
    a = jax.ShapeDtypeStruct((480, 480), jnp.float32)
    wafer = wk.Wafer.abstract(wk.WSE3, 12, 12)
    e = wk.estimate(lambda x: wk.matmul(jnp.tanh(wk.matmul(x, x)), x), a, wafer=wafer)
    for lane, busy in e.busy.items():
        drawn = sum(v.share * (v.end - v.start) for v in e.events if v.lane == lane)
        assert drawn == pytest.approx(busy, rel=0.02)
    assert any(v.name == "too many to show" for v in e.events)


@pytest.mark.parametrize(
    "numbers", [[240, 256, 300, 360, 420, 480, 512, 540, 600, 660, 720], [1, 2, 4, 8, 16], [7]]
)
def test_labels_of_an_axis_do_not_touch(numbers):
    shown = scaling.labeled_numbers(numbers)
    assert shown[0] == numbers[0] and shown[-1] == numbers[-1]
    room = np.diff(np.log(shown)) / np.log(numbers[-1] / numbers[0]) if len(numbers) > 1 else []
    assert all(r >= 0.12 for r in room)
    assert len(shown) == len(numbers) or len(numbers) > 8


@pytest.mark.parametrize("values", [(7200, 9100, 10300), (1.1e6, 1.9e6), (2, 2000), (5.0,), (5, 5)])
def test_an_axis_of_values_has_labels(values):
    with figure.style():
        made = scaling.draw_scaling({"a": [*enumerate(values, 1)]}, {}, "wafers", "tokens/s")
    (axes,) = made.axes
    low, high = axes.get_ylim()
    labels = [t for t in axes.yaxis.get_majorticklocs() if low <= t <= high]
    assert 2 <= len(labels) <= 12
    assert axes.get_legend() is None  # of one line there is nothing to tell


def test_the_title_of_a_map_is_not_wider_than_the_map():
    """Its note on defects is long, and a map on a page is narrow."""
    defects = wk.Defects.random(wk.WSE3, 0.999)
    wafer = wk.Wafer.abstract(wk.WSE3, 20, 40, defects=defects)
    e = wk.estimate(wk.matmul, *[jax.ShapeDtypeStruct((80, 80), jnp.float32)] * 2, wafer=wafer)
    load = quantities.on_wafer(e, quantities.quantity_of(e))
    with figure.style(of_page=True):
        made = wafer_map.draw_map(
            load, np.zeros(load.values.shape, bool), quantities.extent(e), 4.2
        )
        made.canvas.draw()
    for axes in made.axes:
        for text in axes.findobj(Text):
            box = text.get_window_extent()
            assert not text.get_text() or box.x1 <= made.bbox.x1 and box.y1 <= made.bbox.y1
