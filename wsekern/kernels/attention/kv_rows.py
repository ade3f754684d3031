"""How one row of PEs takes tokens into its part of a key-value cache, and passes others on.

Public per-PE functions. C. He et al., "WaferLLM: Large Language Model Inference at Wafer Scale",
OSDI 2025, for the shift.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from wsekern import fabric
from wsekern.kernels.attention.kv_balance import Balance
from wsekern.wafer.axes import ROWS

Slots = Float[Array, "B K slots H"]
KV = tuple[Slots, Slots]  # keys, values
Lengths = Int[Array, " B"]
_Entry = Float[Array, "2 B K H"]  # of keys and values
_Tile = Float[Array, "2 B K St H"]


def append(
    k: Slots,
    v: Slots,
    new_k: Float[Array, "B T K H"],
    new_v: Float[Array, "B T K H"],
    lengths: Lengths,
    active: Bool[Array, " B"],
    balance: Balance,
) -> KV:
    """Keys and values with T more tokens of the active sequences, in one shift of an entry each.

    Args:
      k: keys that this PE holds.
      v: values.
      new_k: keys of the new tokens, which the bottom row takes.
      new_v: values.
      lengths: the tokens that each sequence had before.
      active: which sequences grow, if they have room.
      balance: which row holds which tokens.
    """

    new_k, new_v = mark_not_finite(new_k, new_v)

    def step(carry: tuple[KV, Lengths], entry: _Entry) -> tuple[tuple[KV, Lengths], None]:
        kv, lengths = carry
        after = balance.lengths_after(lengths, active, 1)
        return (_append_one(kv, entry, lengths, after, balance), after), None

    entries = jnp.stack([new_k, new_v]).transpose(2, 0, 1, 3, 4)
    if len(entries) == 1:
        return step(((k, v), lengths), entries[0])[0][0]
    return lax.scan(step, ((k, v), lengths), entries)[0][0]


def fill(
    k: Slots,
    v: Slots,
    new_k: Float[Array, "B St K H"],
    new_v: Float[Array, "B St K H"],
    lengths: Lengths,
    active: Bool[Array, " B"],
    balance: Balance,
) -> KV:
    """Keys and values of prompts whose tiles go once round y: p - 1 shifts of a tile on p PEs.

    Args:
      k: keys that this PE holds; they stay where no new ones replace them.
      v: values.
      new_k: this row's tile of the prompts' keys.
      new_v: values.
      lengths: the tokens of each prompt.
      active: which sequences are replaced.
      balance: which row holds which tokens.
    """
    new_k, new_v = mark_not_finite(new_k, new_v)
    row, p = _row(balance), balance.rows
    first = balance.first(lengths, row)
    position = first[:, None] + balance.offsets(lengths, row)
    needed = active[:, None] & (position < balance.first(lengths, row + 1)[:, None])

    def take(kv: KV, tile: _Tile, source: Int[Array, ""] | int) -> KV:
        """`kv` with the tokens of this row that are in the tile of the row `source`."""
        index = position - source * tile.shape[3]
        inside = (needed & (index >= 0) & (index < tile.shape[3]))[:, None, :, None]
        pick = jax.vmap(lambda x, at: jnp.take(x, at, axis=1, mode="clip"))
        k, v = (jnp.where(inside, pick(new, index), old) for old, new in zip(kv, tile, strict=True))
        return k, v

    def step(carry: tuple[KV, _Tile], distance: Int[Array, ""]) -> tuple[tuple[KV, _Tile], None]:
        kv, tile = carry
        arriving = fabric.shift(tile, ROWS)
        return (take(kv, tile, (row - distance) % p), arriving), None

    kv, tile = (k, v), jnp.stack([new_k, new_v]).swapaxes(2, 3)
    if p > 1:
        (kv, tile), _ = lax.scan(step, (kv, tile), jnp.arange(p - 1))
    # The last tile is met outside the loop: it need not travel on.
    return take(kv, tile, (row + 1) % p)


def mark_not_finite(
    k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]
) -> tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]]:
    """Tokens whose values are not finite, with a key of NaN and values of 0 instead.

    Attention hides a token by its score, and so hides what its key holds. Its values it hides by a
    weight of 0, and 0 times NaN is NaN. So the mark stands in the key: who sees the token gets NaN,
    and it harms nobody else, also when its slot is left over from an earlier sequence.
    """
    finite = jnp.isfinite(v).all(-1, keepdims=True)
    return jnp.where(finite, k, jnp.nan), jnp.where(finite, v, 0)


def _append_one(kv: KV, new: _Entry, before: Lengths, after: Lengths, balance: Balance) -> KV:
    """One token more: `before` and `after` are the lengths of the sequences."""
    row = _row(balance)
    arriving = new
    if balance.rows > 1:
        # Every row sends its oldest entry up; the row above writes it only where its own range of
        # tokens grows, so nothing is decided by the sender.
        oldest = balance.first(before, row) % balance.slots
        from_below = fabric.shift(_entries(kv, oldest), ROWS, -1, periodic=False)
        arriving = jnp.where(row == balance.rows - 1, new, from_below)
    end = balance.first(before, row + 1)
    grows = balance.first(after, row + 1) > end
    slot = jnp.where(grows, end % balance.slots, -1)  # -1: nothing is written
    return _write(kv[0], arriving[0], slot), _write(kv[1], arriving[1], slot)


# Below, a cache is a matrix with a row for each sequence, head and slot. Of entries that span the
# heads, XLA for TPUs wants the heads next to the features, and copies the whole cache into that
# order at every token.


def _entries(kv: KV, slot: Int[Array, " B"]) -> _Entry:
    """What one slot of each sequence holds."""
    rows = _rows_of(slot, kv[0].shape)
    H = kv[0].shape[-1]
    return jnp.stack([jnp.take(x.reshape(-1, H), rows, axis=0, mode="clip") for x in kv])


def _write(x: Slots, entry: Float[Array, "B K H"], slot: Int[Array, " B"]) -> Slots:
    """`x` with `entry` in one slot of each sequence, and unchanged for slot -1."""
    B, K, slots, H = x.shape
    # One entry more, for a place that does not exist. XLA turns a scatter of a single entry into a
    # dynamic-update-slice, fuses that into each of its users, and copies the whole cache for it.
    if K == 1:  # as a matrix, XLA's CPU backend would copy it whole
        sequence = jnp.append(jnp.arange(B), 0)
        slot = jnp.append(jnp.where(slot < 0, slots, slot), slots)
        entry = jnp.concatenate([entry, entry[:1]])
        return x.at[sequence, :, slot].set(entry, mode="drop")
    rows = jnp.where(slot[:, None] < 0, B * K * slots, _rows_of(slot, x.shape))
    rows = jnp.append(rows, B * K * slots)
    entry = entry.reshape(B * K, H)
    entry = jnp.concatenate([entry, entry[:1]])
    return x.reshape(-1, H).at[rows].set(entry, mode="drop").reshape(x.shape)


def _rows_of(slot: Int[Array, " B"], shape: tuple[int, ...]) -> Int[Array, "B K"]:
    """The row of each head of one slot of each sequence, of a cache `[B, K, slots, H]`."""
    B, K, slots, _ = shape
    return (jnp.arange(B)[:, None] * K + jnp.arange(K)[None]) * slots + slot[:, None]


def _row(balance: Balance) -> Int[Array, ""] | int:
    return fabric.axis_index(ROWS) if balance.rows > 1 else 0
