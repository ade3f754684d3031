"""Explain which algorithm `attention` takes, and what each of them costs a PE."""

from __future__ import annotations

import dataclasses

import jax
from jaxtyping import Float, Int

from wsekern.kernels.attention import operands
from wsekern.kernels.attention.implementation import Implementation
from wsekern.kernels.attention.operands import Described, Floats, Segments
from wsekern.kernels.attention.plan import (
    REQUIREMENTS,
    Algorithm,
    AttentionOptions,
    Choice,
    plan_attention,
    ulysses_refused,
    zigzag_refused,
)
from wsekern.wafer import context
from wsekern.wafer.explanation import Candidate, Explanation
from wsekern.wafer.keywords import accept_jax_names
from wsekern.wafer.platforms import Platform, platforms_of
from wsekern.wafer.wafer import Wafer


@accept_jax_names("attention", REQUIREMENTS, is_causal="causal")
def explain(
    q: Float[Described, "B T N H"],
    k: Float[Described, "B S K H"],
    v: Float[Described, "B S K H"],
    *,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: Float[Described, " N"] | None = None,
    segment_ids: Int[Described, "B T"]
    | tuple[Int[Described, "B T"], Int[Described, "B S"]]
    | None = None,
    bias: Float[Described, "..."] | None = None,
    algorithm: Algorithm = "auto",
    implementation: Implementation = "auto",
    precision: jax.lax.PrecisionLike = None,
    wafer: Wafer | None = None,
    is_causal: bool | None = None,
) -> Explanation:
    """Which algorithm `attention` takes for the same arguments, why, and what each would cost.

    Nothing is computed. `print` the result for a table of "ring", "zigzag" (the ring for causal
    queries), "allgather" and "ulysses": the 32-bit words that a PE receives for the result (a
    gradient costs about twice that), the steps that wait for one another, the bytes of other PEs'
    tiles that it holds at a time, or why the algorithm cannot serve. Where there is one PE or no
    wafer, the algorithm is "plain" and the table is empty. A line above the table says what
    computes a PE's tiles, and why.

    Args:
      q: queries, or their `jax.ShapeDtypeStruct`; so for all arrays.
      k: keys.
      v: values.
      causal: as for `attention`, like every other keyword.
      window: how many keys a query sees.
      scale: what the products are multiplied by; it changes no cost.
      soft_cap: the limit of the scores; it changes no cost.
      sinks: one more score a head.
      segment_ids: of the rows of queries and keys.
      bias: added to the scores.
      algorithm: "auto", "ring", "allgather" or "ulysses".
      implementation: "auto", "xla", "splash", "cudnn" or "pallas".
      precision: of every product; it changes no cost.
      wafer: where it would run; by default the current wafer.
      is_causal: JAX's name for `causal`; give one of the two.

    Raises:
      ValueError: as `attention`.
    """
    asked = AttentionOptions(
        causal=causal,
        window=window,
        scale=scale,
        soft_cap=soft_cap,
        precision=precision,
        algorithm=algorithm,
        implementation=implementation,
    )
    floats, segments = operands.pack(q, k, v, bias, sinks, segment_ids)
    platform = platforms_of(wafer, q)[0]
    wafer = context.resolve(wafer, computes=False)
    choice = plan_attention(floats, segments, asked, wafer, platform)
    candidates = {} if wafer is None else _candidates(floats, segments, asked, wafer, platform)
    return Explanation(
        operation="attention",
        algorithm="plain" if wafer is None else choice.plan.order,
        why=choice.why,
        wafer=wafer,
        by_auto=asked.algorithm == "auto",
        candidates=candidates,
        detail=choice.tiles,
    )


def _candidates(
    floats: Floats,
    segments: Segments,
    options: AttentionOptions,
    wafer: Wafer,
    platform: Platform,
) -> dict[str, Candidate]:
    # "ring" asked for is one of two: in order, or in zig-zag order where that serves.
    no_zigzag = zigzag_refused(floats, options)
    refused = {
        "ring": "" if no_zigzag else "taken in zig-zag order, which gives all PEs the same work",
        "zigzag": no_zigzag,
        "allgather": "",
        "ulysses": ulysses_refused(floats, wafer),
    }

    def candidate(name: str) -> Candidate:
        if refused[name]:
            return Candidate(refused=refused[name])
        algorithm = "ring" if name == "zigzag" else name
        asked = dataclasses.replace(options, algorithm=algorithm)
        try:
            choice = plan_attention(floats, segments, asked, wafer, platform)
        except ValueError as error:  # its tiles are not served by what is asked for
            return Candidate(refused=str(error).removeprefix("attention: "))
        return _cost(floats, segments, choice, wafer)

    return {name: candidate(name) for name in refused}


def _cost(floats: Floats, segments: Segments, choice: Choice, wafer: Wafer) -> Candidate:
    plan = choice.plan
    p, tiles = wafer.height, plan.ring_tiles
    B, _, _, H = floats.q.shape
    B = -(-B // wafer.wafers)
    rows, columns = plan.sizes.queries // p, plan.sizes.keys // p
    item = floats.q.dtype.itemsize
    # Bytes of a PE's tile of queries, of keys and values, and of the segment ids of both.
    queries = B * rows * (plan.sizes.q_heads // wafer.width) * H * item
    keys = 2 * B * columns * (plan.sizes.kv_heads // wafer.width) * H * item
    q_ids = 0 if segments.q is None else B * rows * segments.q.dtype.itemsize
    k_ids = 0 if segments.k is None else B * columns * segments.k.dtype.itemsize
    visitor = keys + k_ids
    # Half a tile of queries and of the result is exchanged. The middle one of p PEs keeps its own.
    exchanged = queries + q_ids / 2 if p > 1 else 0
    if plan.order == "allgather":
        received, steps = (p - 1) * visitor, min(1, p - 1)
        if plan.gathers_by_shifts:
            steps = p // 2
        if plan.balanced:
            received, steps = received + exchanged, steps + 2
        return _candidate(received, steps, (p - 1) * visitor)
    if plan.order == "ulysses":
        share, ids = (p - 1) / p, (p - 1) * (q_ids + k_ids)
        steps = 2 * (p > 1)
        return _candidate(share * (2 * queries + keys) + ids, steps, share * (queries + keys) + ids)
    # Two tiles at a time: one to compute with, one arriving.
    if plan.order == "ring":
        return _candidate((tiles - 1) * visitor, tiles - 1, min(tiles - 1, 2) * visitor)
    moved = exchanged + (visitor / 2 if p > 1 else 0)
    steps = p - 1 + 2 * (p > 1)
    return _candidate((p - 1) * visitor + moved, steps, min(p - 1, 2) * visitor)


def _candidate(received_bytes: float, steps: int, held_bytes: float) -> Candidate:
    return Candidate(words=received_bytes / 4, steps=steps, held_bytes=held_bytes)
