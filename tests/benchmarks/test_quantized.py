"""The loss that the benchmark of quantized weights states."""

import numpy as np
import pytest

from benchmarks.quantized import compare_logprobs


def test_a_loss_is_divergence_and_perplexity():
    p, q = (
        np.log([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]),
        np.log([[0.25, 0.5, 0.25], [0.1, 0.1, 0.8]]),
    )
    tokens = [2, 0]
    same = compare_logprobs([p], [p], tokens, 2)
    assert same["divergence"] == 0 and same["same"] == 1 and same["perplexity_change"] == 0
    loss = compare_logprobs([p], [q], tokens, 2)
    # Only the first row differs: 0.5 log 2 - 0.25 log 2; the next token, 0, is half as likely.
    assert loss["divergence"] == pytest.approx(0.25 * np.log(2) / 2)
    assert loss["perplexity"] == pytest.approx(4) and loss["perplexity_change"] == pytest.approx(1)
    assert loss["same"] == 0.5
