"""This file is how a row of PEs takes tokens into its part of the cache, and passes others up.

Public per-PE functions. C. He et al., "WaferLLM: Large Language Model Inference at Wafer Scale",
OSDI 2025, for the shift.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from wsekern import fabric
from wsekern.kernels.attention.kv_balance import Balance
from wsekern.wafer.axes import ROWS


def append(
    k: Float[Array, "B K slots H"],
    v: Float[Array, "B K slots H"],
    new_k: Float[Array, "B T K H"],
    new_v: Float[Array, "B T K H"],
    lengths: Int[Array, "B"],
    active: Bool[Array, "B"],
    balance: Balance,
) -> tuple[Float[Array, "B K slots H"], Float[Array, "B K slots H"]]:
    """Keys and values with T more tokens of the active sequences; a shift of one entry for each.

    Args:
      k: keys that this PE holds.
      v: values.
      new_k: keys of the new tokens, which the bottom row takes.
      new_v: values.
      lengths: the tokens of each sequence before them.
      active: which sequences grow, if they have room.
      balance: which row holds which tokens.
    """

    def step(carry, new):
        k, v, lengths = carry
        after = balance.grown(lengths, active, 1)
        k, v = _append_one(k, v, new, lengths, after, balance)
        return (k, v, after), None

    new = jnp.stack([new_k, new_v]).transpose(2, 0, 1, 3, 4)
    if len(new) == 1:
        return step((k, v, lengths), new[0])[0][:2]
    return lax.scan(step, (k, v, lengths), new)[0][:2]


def fill(
    k: Float[Array, "B K slots H"],
    v: Float[Array, "B K slots H"],
    new_k: Float[Array, "B St K H"],
    new_v: Float[Array, "B St K H"],
    lengths: Int[Array, "B"],
    active: Bool[Array, "B"],
    balance: Balance,
) -> tuple[Float[Array, "B K slots H"], Float[Array, "B K slots H"]]:
    """Keys and values of prompts, whose tiles pass round y: p - 1 shifts of one tile on p PEs.

    Args:
      k: keys that this PE holds; where nothing replaces them they stay.
      v: values.
      new_k: this row's tile of the prompts' keys.
      new_v: values.
      lengths: the tokens of each prompt.
      active: which sequences are replaced.
      balance: which row holds which tokens.
    """
    here, p = _row(balance), balance.rows
    first = balance.first(lengths, here)
    position = first[:, None] + balance.offsets(lengths, here)
    wanted = active[:, None] & (position < balance.first(lengths, here + 1)[:, None])

    def take(k, v, tile, home):
        place = position - home * tile.shape[3]  # in the tile of the row `home`
        mine = (wanted & (place >= 0) & (place < tile.shape[3]))[:, None, :, None]
        pick = jax.vmap(lambda x, at: jnp.take(x, at, axis=1, mode="clip"))
        return tuple(
            jnp.where(mine, pick(new, place), old) for old, new in zip((k, v), tile, strict=True)
        )

    def step(carry, back):
        k, v, tile = carry
        coming = fabric.shift(tile, ROWS)
        return (*take(k, v, tile, (here - back) % p), coming), None

    tile = jnp.stack([new_k, new_v]).swapaxes(2, 3)
    if p > 1:
        (k, v, tile), _ = lax.scan(step, (k, v, tile), jnp.arange(p - 1))
    # The last tile is met outside the loop, where it need not travel on.
    return take(k, v, tile, (here + 1) % p)


def _append_one(k, v, new, before, after, balance):
    here = _row(balance)
    coming = new
    if balance.rows > 1:
        oldest = balance.first(before, here) % balance.slots
        passed = fabric.shift(_entries(k, v, oldest), ROWS, -1, periodic=False)
        coming = jnp.where(here == balance.rows - 1, new, passed)
    end = balance.first(before, here + 1)
    grows = balance.first(after, here + 1) > end
    # Beyond the slots, nothing is written.
    slot = jnp.where(grows, end % balance.slots, balance.slots)
    return _written(k, coming[0], slot), _written(v, coming[1], slot)


def _entries(k, v, slot):
    """What one slot of each sequence holds, `[2, B, K, H]`."""
    take = jax.vmap(lambda x, slot: lax.dynamic_index_in_dim(x, slot, 1, keepdims=False))
    return jnp.stack([take(k, slot), take(v, slot)])


def _written(x, entry, slot):
    """`x` with `entry` in one slot of each sequence."""
    # One entry more, for no slot: of a single one XLA makes an update-slice, which it fuses into
    # each of its users, and copies the whole cache for that.
    sequence, slot = jnp.append(jnp.arange(len(x)), 0), jnp.append(slot, x.shape[2])
    entry = jnp.concatenate([entry, entry[:1]])
    return x.at[sequence, :, slot].set(entry, mode="drop")


def _row(balance):
    return fabric.axis_index(ROWS) if balance.rows > 1 else 0
