"""One import away: with JAX's NumPy in the place of NumPy, gpt2() compiles and differentiates. Many devices: README."""

from unittest.mock import patch

import numpy as np
import pytest
from conftest import GOLDEN

import gpt2

jax = pytest.importorskip("jax", reason="JAX is optional: pip install jax")
IDS = GOLDEN[3]["ids"]


def test_logits(model):
    """A JAX array with NumPy's logits, for a batch."""
    ids = [IDS, IDS[::-1]]
    with patch.object(gpt2, "np", jax.numpy):
        logits = gpt2.gpt2(ids, **model[2], n_head=4)
    assert isinstance(logits, jax.Array) and logits.dtype == np.float32
    np.testing.assert_allclose(logits, gpt2.gpt2(ids, **model[2], n_head=4), rtol=0, atol=5e-4)


def test_jit(model):
    """Compiled once for a length, whatever the ids and the weights."""
    lengths, params, other = [], model[2], {**model[2], "wpe": 0 * model[2]["wpe"]}
    compiled = jax.jit(lambda ids, **params: lengths.append(len(ids)) or gpt2.gpt2(ids, **params, n_head=4))
    for ids, weights in (IDS, params), (IDS[::-1], params), (IDS, other), (IDS[:4], params):
        with patch.object(gpt2, "np", jax.numpy):
            logits = compiled(np.array(ids), **weights)
        np.testing.assert_allclose(logits, gpt2.gpt2(ids, **weights, n_head=4), rtol=0, atol=5e-4)
    assert lengths == [len(IDS), 4]


def test_grad(model):
    """The gradient of the loss is finite for every weight; in each tensor the largest is the slope NumPy measures.

    The loss is the mean of -log p(next token). The slope: central differences in float64, which JAX has no part in.
    """
    ids = np.array(GOLDEN[5]["ids"])

    def loss(params):
        probs = gpt2.softmax(gpt2.gpt2(ids[:-1], **params, n_head=4))
        return -gpt2.np.log(probs[np.arange(len(ids) - 1), ids[1:]]).mean()

    with patch.object(gpt2, "np", jax.numpy):
        gradient = jax.jit(jax.grad(loss))(model[2])
    slopes, tree = jax.tree.flatten(jax.tree.map(np.asarray, gradient))
    assert tree == jax.tree.structure(model[2])
    weights = jax.tree.map(lambda weight: weight.astype(np.float64), model[2])
    for weight, slope in zip(jax.tree.leaves(weights), slopes):
        assert weight.shape == slope.shape and np.isfinite(slope).all()
        place = np.unravel_index(np.abs(slope).argmax(), slope.shape)
        kept, losses = weight[place], []
        for value in (kept + 1e-5, kept - 1e-5):
            weight[place] = value
            losses.append(loss(weights))
        weight[place] = kept
        assert abs(slope[place]) > 1e-4 and slope[place] == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-3)
