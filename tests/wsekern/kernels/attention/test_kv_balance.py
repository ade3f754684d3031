"""Which row of PEs holds which tokens, for any number of rows and any length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsekern.kernels.attention.kv_balance import Balance

balances = st.builds(
    Balance, rows=st.integers(1, 9), max_tokens=st.integers(1, 40), slides=st.booleans()
)


def firsts(balance):
    """The first token of each row, and where the last row ends, `[lengths, rows + 1]`."""
    lengths = jnp.arange(2 * balance.max_tokens + 2 if balance.slides else balance.max_tokens + 1)
    rows = range(balance.rows + 1)
    return np.stack(jax.jit(lambda n: [balance.first(n, row) for row in rows])(lengths), 1)


@pytest.mark.slow
@settings(derandomize=True, deadline=None, max_examples=20)
@given(balances)
def test_rows_hold_equally_many_of_the_newest_tokens_in_order(balance):
    first = firsts(balance)
    held = np.diff(first)
    lengths = np.arange(len(first))
    assert (held.max(1) - held.min(1) <= 1).all()
    assert (np.sort(held, 1) == held).all()
    assert (held <= balance.slots).all()
    np.testing.assert_array_equal(first[:, -1], lengths)
    np.testing.assert_array_equal(held.sum(1), np.minimum(lengths, balance.max_tokens))


@pytest.mark.slow
@settings(derandomize=True, deadline=None, max_examples=20)
@given(balances)
def test_a_new_token_moves_at_most_one_of_each_row_and_only_to_the_next(balance):
    first = firsts(balance)
    before, after = first[:-1], first[1:]
    passed = after - before
    assert set(np.unique(passed)) <= {0, 1}
    assert (passed[:, -1] == 1).all()  # the new token enters the bottom row
    # What a row passes up it has: its first token, unless it is older than all that are held.
    for row in range(balance.rows):
        sends = (passed[:, row] == 1) & (before[:, row] >= after[:, 0])
        assert (before[sends, row] < before[sends, row + 1]).all()


def test_offsets_say_which_token_a_slot_has():
    balance = Balance(rows=3, max_tokens=12, slides=True)
    lengths = jnp.arange(30)
    for row in range(3):
        first = np.asarray(balance.first(lengths, row))
        token = first[:, None] + np.asarray(balance.offsets(lengths, row))
        assert (token % balance.slots == np.arange(balance.slots)).all()
        assert (token >= first[:, None]).all() and (token < first[:, None] + balance.slots).all()


def test_lengths_grow_where_there_is_room():
    lengths, active = jnp.array([0, 4, 5, 2]), jnp.array([True, True, True, False])
    kept = Balance(rows=2, max_tokens=5, slides=False)
    slid = Balance(rows=2, max_tokens=5, slides=True)
    np.testing.assert_array_equal(kept.lengths_after(lengths, active, 2), [2, 5, 5, 2])
    np.testing.assert_array_equal(slid.lengths_after(lengths, active, 2), [2, 6, 7, 2])
