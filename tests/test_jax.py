"""One import away: with JAX's NumPy in the place of NumPy, gpt2() compiles, differentiates and runs on many devices."""

import os

import numpy as np
import pytest
from conftest import GOLDEN

import gpt2

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"  # the processor plays eight devices
jax = pytest.importorskip("jax", reason="JAX is optional: pip install jax")
IDS = GOLDEN[3]["ids"]


@pytest.fixture
def on_jax(monkeypatch):
    """The model as it stands, on JAX."""
    monkeypatch.setattr(gpt2, "np", jax.numpy)


def numpy_logits(model, inputs):
    _, hparams, params = model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpt2, "np", np)
        return gpt2.gpt2(inputs, **params, n_head=hparams["n_head"])


@pytest.mark.parametrize("inputs", [IDS, [IDS, IDS[::-1]], np.array(IDS)], ids=["list", "batch", "array"])
def test_logits(model, on_jax, inputs):
    """A JAX array with NumPy's logits."""
    _, hparams, params = model
    logits = gpt2.gpt2(inputs, **params, n_head=hparams["n_head"])
    assert isinstance(logits, jax.Array)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, numpy_logits(model, inputs), rtol=0, atol=5e-4)


def test_jit(model, on_jax):
    """Compiled once for a length, whatever the ids and the weights; the logits are NumPy's."""
    _, hparams, params = model
    traced = []

    def traced_gpt2(inputs, n_head, **params):
        traced.append(inputs.shape)
        return gpt2.gpt2(inputs, **params, n_head=n_head)

    compiled = jax.jit(traced_gpt2, static_argnames="n_head")
    other = {**params, "wpe": params["wpe"] * 0}
    for weights, ids in [(params, IDS), (params, IDS[::-1]), (other, IDS), (params, IDS)]:
        logits = compiled(np.array(ids), n_head=hparams["n_head"], **weights)
        expected = numpy_logits((None, hparams, weights), ids)
        np.testing.assert_allclose(logits, expected, rtol=0, atol=5e-4)
    assert traced == [(len(IDS),)]
    compiled(np.array(IDS[:4]), n_head=hparams["n_head"], **params)
    assert traced == [(len(IDS),), (4,)]


def test_grad(model, monkeypatch):
    """The gradient of the loss is finite for every weight; in each tensor the largest is the slope NumPy measures.

    The loss is the mean of -log p(next token). The slope: central differences in float64, which JAX has no part in.
    """
    _, hparams, params = model
    ids = np.array(GOLDEN[5]["ids"])

    def loss(params, xp):
        logits = gpt2.gpt2(ids[:-1], **params, n_head=hparams["n_head"])
        logits = logits - logits.max(-1, keepdims=True)
        log_probs = logits - xp.log(xp.exp(logits).sum(-1, keepdims=True))
        return -log_probs[np.arange(len(ids) - 1), ids[1:]].mean()

    with monkeypatch.context() as patch:
        patch.setattr(gpt2, "np", jax.numpy)
        gradient = jax.jit(jax.grad(loss), static_argnums=1)(params, jax.numpy)
    slopes, tree = jax.tree.flatten(jax.tree.map(np.asarray, gradient))
    assert tree == jax.tree.structure(params)
    weights = jax.tree.map(lambda weight: weight.astype(np.float64), params)
    for weight, slope in zip(jax.tree.leaves(weights), slopes):
        assert weight.shape == slope.shape
        assert np.isfinite(slope).all()
        place = np.unravel_index(np.abs(slope).argmax(), slope.shape)
        assert abs(slope[place]) > 1e-4
        kept, step, losses = weight[place], 1e-5, []
        for value in (kept + step, kept - step):
            weight[place] = value
            losses.append(loss(weights, np))
        weight[place] = kept
        assert slope[place] == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=1e-3)


def test_sharded_batch(model, on_jax):
    """A batch of 16 over 8 devices: each computes two rows, together they are NumPy's."""
    _, hparams, params = model
    inputs = np.random.default_rng(0).integers(hparams["n_vocab"], size=(16, 12))
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ["batch"])
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
    compiled = jax.jit(gpt2.gpt2, static_argnames="n_head")
    logits = compiled(jax.device_put(inputs, rows), **params, n_head=hparams["n_head"])
    shapes = [shard.data.shape for shard in logits.addressable_shards]
    assert shapes == [(2, 12, hparams["n_vocab"])] * 8
    np.testing.assert_allclose(logits, numpy_logits(model, inputs), rtol=0, atol=5e-4)
