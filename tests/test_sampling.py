"""Sampling: the probabilities held to the definition and to HF transformers, what is drawn to the probabilities."""

import math
import re
from functools import partial

import numpy as np
import pytest
from conftest import GOLDEN
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import gpt2

PROMPTS = [golden["ids"] for golden in GOLDEN]
COMMA = GOLDEN[0]["greedy"][2]  # five of the six greedy texts have one

# ---- sample_probs ---------------------------------------------------------------------------------------------------


def plain_probs(logits, temperature=1.0, top_k=None, top_p=None):
    """The definition, for one list of logits; the case where rounding decides what the nucleus is, is passed over."""
    scaled = [x / temperature for x in logits]
    if top_k:
        least = sorted(scaled)[-top_k:][0]
        scaled = [x if x >= least else -math.inf for x in scaled]
    weights = [math.exp(x - max(scaled)) for x in scaled]
    if top_p and top_p < 1:
        total, least = 0, 0
        for weight in sorted(weights, reverse=True):
            total += weight / math.fsum(weights)
            assume(abs(total - top_p) > 1e-9)
            if total >= top_p:
                least = weight
                break
        weights = [weight if weight >= least else 0 for weight in weights]
    return [weight / math.fsum(weights) for weight in weights]


@st.composite
def cases(draw):
    """(logits [n], [2, n] or [2, 3, n], temperature, top_k, top_p); coarse logits, so that many are equal."""
    shape = *draw(st.sampled_from([(), (2,), (2, 3)])), draw(st.integers(1, 30))
    values = st.integers(-80, 80) if draw(st.booleans()) else st.integers(-2, 2)
    n = math.prod(shape)
    logits = np.array(draw(st.lists(values, min_size=n, max_size=n)), np.float32).reshape(shape) / 8
    temperature = draw(st.just(1.0) | st.floats(0.05, 20) | st.sampled_from([1e-300, 1e9]))
    top_k = draw(st.none() | st.integers(0, shape[-1] + 2))
    logits = np.asfortranarray(logits) if draw(st.booleans()) else logits
    return logits, temperature, top_k, draw(st.none() | st.floats(1e-6, 1, exclude_max=True) | st.just(1))


@settings(deadline=None, max_examples=1000)
@given(cases())
def test_definition(case):
    """Temperature, then top-k, then top-p, each with all that tie with the last one kept, on each row, to rounding."""
    logits, *options = case
    before = logits.copy()
    probs = gpt2.sample_probs(logits, *options)
    assert probs.shape == logits.shape
    assert np.array_equal(logits, before)
    for row, result in zip(logits.reshape(-1, logits.shape[-1]), probs.reshape(-1, logits.shape[-1])):
        expected = plain_probs(row.tolist(), *options)
        assert [p > 0 for p in result] == [p > 0 for p in expected]
        np.testing.assert_allclose(result, expected, rtol=1e-9)


# softmax of what HF transformers 5.23.0 (torch 2.13, float64) gives for these logits with its TemperatureLogitsWarper,
# TopKLogitsWarper and TopPLogitsWarper, one after the other
LOGITS = [2.5, -1.0, 0.3, 1.7, -4.2, 0.4, 2.1, -0.6]
BY_HF = {
    (1.9, None, None): [0.2860984, 0.0453419, 0.0898769, 0.1877823, 0.008415, 0.094734, 0.2317848, 0.0559667],
    (None, 3, None): [0.4717762, 0.0, 0.0, 0.2119827, 0.0, 0.0, 0.3162411, 0.0],
    (None, None, 0.9): [0.4460094, 0.0, 0.0, 0.2004049, 0.0, 0.0546167, 0.298969, 0.0],
    (1.5, None, 0.8): [0.384738, 0.0, 0.0, 0.2257051, 0.0, 0.0948752, 0.2946817, 0.0],
    (0.8, 4, 0.9): [0.5064804, 0.0, 0.0, 0.1863237, 0.0, 0.0, 0.3071959, 0.0],
    (2.5, 5, 0.97): [0.291989, 0.0, 0.1211121, 0.2120275, 0.0, 0.1260547, 0.2488166, 0.0],
}


@pytest.mark.parametrize("options", BY_HF, ids=str)
def test_as_hf_transformers(options):
    """Numbers computed once with HF's warpers; an option that was not given is None here."""
    temperature, top_k, top_p = options
    probs = gpt2.sample_probs(LOGITS, 1.0 if temperature is None else temperature, top_k, top_p)
    np.testing.assert_allclose(probs, BY_HF[options], rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    "weights, options, kept",
    [
        ([1, 4, 2, 1], {"top_p": 0.5}, [1]),  # exactly p is enough
        ([1, 4, 2, 1], {"top_p": 0.5001}, [1, 2]),
        ([1, 4, 2, 1], {"top_p": 0.75}, [1, 2]),
        ([1, 4, 2, 1], {"top_p": 0.8}, [0, 1, 2, 3]),  # all that tie
        ([1, 4, 2, 1], {"top_p": 1e-9}, [1]),  # never empty
        ([1, 1, 1, 1], {"top_p": 0.5}, [0, 1, 2, 3]),
        ([1, 4, 2, 1], {"top_k": 3}, [0, 1, 2, 3]),
        ([1, 4, 2, 1], {"top_k": 2}, [1, 2]),
        ([1, 4, 2, 1], {"top_k": 2, "top_p": 0.6}, [1]),  # 4/6 of what top-k leaves
        ([1, 4, 2, 1], {"temperature": 0.5, "top_p": 0.7}, [1]),  # 16/22
        ([1, 4, 2, 1], {"temperature": 1e-300}, [1]),
        ([4, 4, 2, 1], {"temperature": 0}, [0, 1]),  # the limit
        ([1, 4, 2, 1], {"temperature": 1e9}, [0, 1, 2, 3]),
    ],
)
def test_kept(weights, options, kept):
    """Which tokens are left, in cases without rounding; and nothing overflows on the way to it."""
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        probs = gpt2.sample_probs(np.log2(weights) * math.log(2), **options)
    assert np.flatnonzero(probs).tolist() == kept
    assert abs(probs.sum() - 1) < 1e-12


def test_nucleus_of_a_large_vocabulary():
    """50,257 logits of any spread: the nucleus reaches p and would not without its least probable token."""
    for spread in (0.01, 1, 5, 20):
        logits = np.random.default_rng(1).normal(0, spread, 50257)
        for p in (0.001, 0.5, 0.9, 0.999999):
            full, probs = gpt2.sample_probs(logits), gpt2.sample_probs(logits, top_p=p)
            kept = full[probs > 0]
            assert kept.sum() >= p - 1e-12
            assert kept.sum() - kept.min() < p + 1e-12
            assert kept.min() >= full[probs == 0].max(initial=0)
            np.testing.assert_allclose(probs[probs > 0], kept / kept.sum(), rtol=1e-9)


# ---- What is drawn --------------------------------------------------------------------------------------------------


@pytest.fixture
def sample(model):
    """generate on the bundled model."""
    _, hparams, params = model

    def sample(inputs, n_tokens_to_generate=12, **options):
        return gpt2.generate(inputs, params, hparams["n_head"], n_tokens_to_generate, **options)

    return sample


DRAWN = [
    {"temperature": 1},
    {"temperature": 0.7, "top_k": 20},
    {"top_p": 0.8},
    {"temperature": 3, "top_k": 500, "top_p": 0.9},
]


@pytest.mark.parametrize("options", DRAWN, ids=str)
def test_frequencies(sample, model, options):
    """10,000 draws of the token after "O" spread over the tokens as sample_probs says, and over no others."""
    _, hparams, params = model
    probs = gpt2.sample_probs(gpt2.gpt2(PROMPTS[0], **params, n_head=hparams["n_head"])[-1], **options)
    n, n_rows = 10_000, 1_000
    drawn = [sample([PROMPTS[0]] * n_rows, 1, **options, seed=1, first_row=i) for i in range(0, n, n_rows)]
    counts = np.bincount(np.ravel(drawn), minlength=len(probs))
    assert counts.sum() == n
    assert not counts[probs == 0].any()
    often = n * probs >= 5  # the others are one class together
    expected = np.append(n * probs[often], n * probs[~often].sum())
    observed = np.append(counts[often], counts[~often].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    chi_square, freedom = ((observed - expected) ** 2 / expected).sum(), len(expected) - 1
    assert abs(chi_square - freedom) < 4 * math.sqrt(2 * freedom)
    assert (np.abs(observed - expected) < 5 * np.sqrt(expected)).all()


@pytest.mark.parametrize(
    "options, same",
    [
        ({}, {}),
        ({"temperature": 0}, {}),
        ({"temperature": 0, "seed": 3}, {}),
        ({"top_k": 1}, {}),
        ({"top_p": 1e-9}, {}),
        ({"seed": 3}, {"temperature": 1, "seed": 3}),
        ({"seed": 0}, {"temperature": 1.0, "top_k": 0, "top_p": 1, "seed": "0"}),
        ({"top_k": 0, "seed": 3}, {"temperature": 1, "seed": 3}),
        ({"top_k": 40, "seed": 3}, {"temperature": 1, "top_k": 40, "top_p": 1, "seed": 3}),
    ],
    ids=str,
)
def test_what_options_mean(sample, options, same):
    """Greedy when none is given or temperature is 0; each left out is neutral; and sampling is not greedy."""
    result, greedy = sample(PROMPTS[2], **options), GOLDEN[2]["greedy"][:12]
    assert result == (sample(PROMPTS[2], **same) if same else greedy)
    assert bool(same) == (result != greedy)


SEEDS = [0, 1, 5, 6, 2**32, 2**32 + 5, 2 * 2**32 + 5, 2**64 + 5, 10**20]


def test_seed(sample):
    """The same seed gives the same ids, another one or none gives others, in every row."""
    rows = [row for seed in [*SEEDS, None, None] for row in sample([PROMPTS[2]] * 3, temperature=1.2, seed=seed)]
    assert len({tuple(ids) for ids in rows}) == 3 * (len(SEEDS) + 2)
    again = [row for seed in SEEDS for row in sample([PROMPTS[2]] * 3, temperature=1.2, seed=seed)]
    assert again == rows[: len(again)]


def test_rows_are_independent(sample):
    """A row draws by its place alone: not by its neighbours or their number, nor by how long it goes on."""
    options = {"temperature": 1.1, "top_p": 0.95, "seed": 2}
    rows = sample(PROMPTS, **options)
    changed = sample([PROMPTS[3], *PROMPTS[1:3], [7], [8, 9], PROMPTS[5], [10]], **options)
    assert [changed[i] for i in (1, 2, 5)] == [rows[i] for i in (1, 2, 5)]
    assert sample(PROMPTS[0], 20, **options)[:12] == rows[0]
    assert sample(PROMPTS[3:], **options, first_row=3) == rows[3:]


def test_the_last_digits_hardly_matter():
    """The choice among 50,000 tokens stays when all logits change by a millionth, as they may with another batch."""
    rng, texts = np.random.default_rng(0), []
    wte, wpe = rng.normal(size=(50_000, 9)).astype(np.float32), rng.normal(size=(301, 9)).astype(np.float32)
    for change in 0, 1e-6:
        params = {"wpe": wpe, "ln_f": {"g": 1, "b": 0}, "blocks": []}
        params["wte"] = wte * (1 + change * rng.normal(size=wte.shape).astype(np.float32))
        texts.append(gpt2.generate([0], params, 3, 300, seed=1))
    assert texts[0] == texts[1]


# ---- Ends and mistakes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"temperature": 1, "top_k": 20, "seed": 1}], ids=["greedy", "seeded"])
def test_stop(model, sample, options):
    """Until all rows have had their stop_id, every row goes on as if nothing had happened; then the steps end."""
    _, hparams, params = model
    rows = sample(PROMPTS[:3], 40, **options)
    needed = max(row.index(COMMA) for row in rows) + 1
    assert needed < 40
    steps = gpt2.generate_steps(PROMPTS[:3], params, hparams["n_head"], 40, stop_id=COMMA, **options)
    assert np.stack(list(steps), axis=1).tolist() == [row[:needed] for row in rows]


def test_steps_come_one_by_one(model, monkeypatch):
    """An id is there after one pass of the model: nothing is computed before it is asked for."""
    _, hparams, params = model
    calls, original = [], gpt2.gpt2
    monkeypatch.setattr(gpt2, "gpt2", lambda *args, **kwargs: calls.append(0) or original(*args, **kwargs))
    steps = gpt2.generate_steps([PROMPTS[0]], params, hparams["n_head"], 10)
    for n, id in enumerate(GOLDEN[0]["greedy"][:5], 1):
        assert next(steps).tolist() == [id]
        assert len(calls) == n


BAD = {
    "temperature": [-1, math.nan, math.inf, 1.1e9, "hot", "", [1]],
    "top_k": [-1, 1.5, "1.5", "many", math.nan],
    "top_p": [0, -0.1, 1.0000001, 90, math.nan, "0", "most", ""],
    "seed": [-1, 0.5, "luck", "", 10**20 + 1],
    "n_tokens_to_generate": [-1, 1.5, "1.5", "0", "many", math.inf],
    "batch_size": [0, -1, 1.5, "all"],
}


@pytest.mark.parametrize("name", [*BAD, "temprature"])
def test_bad_options(sample, name):
    """What makes no sense is refused, by name and value, by each function that takes it; so is an unknown option."""
    for value in BAD.get(name, [1]):
        calls = [lambda **options: gpt2.main("O", models_dir="nowhere", **options)]  # before anything is loaded
        calls += [partial(sample, PROMPTS[0])] * (name != "batch_size")
        calls += [partial(gpt2.sample_probs, LOGITS)] * (name in ("temperature", "top_k", "top_p"))
        expected = (ValueError, f"^{name} must .* not {re.escape(repr(value))}$") if name in BAD else (TypeError, name)
        for call in calls:
            with pytest.raises(expected[0], match=expected[1]):
                call(**{name: value})
