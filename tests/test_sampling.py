"""Sampling: the probabilities held to the definition and to HF transformers, what is drawn to the probabilities."""

import math
import re

import numpy as np
import pytest
from conftest import GOLDEN, nested, random_tensors
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import gpt2

PROMPTS = [golden["ids"] for golden in GOLDEN]


def plain_probs(logits, temperature, top_k, top_p):
    """The definition, for one list of logits; the case where rounding decides what the nucleus is, is passed over."""
    scaled = [x / (1 if temperature is None else temperature or 1e-300) for x in logits]
    if top_k:
        least = sorted(scaled)[-top_k:][0]
        scaled = [x if x >= least else -math.inf for x in scaled]
    weights = [math.exp(x - max(scaled)) for x in scaled]
    if top_p and top_p < 1:
        total = 0
        for least in sorted(weights, reverse=True):
            total += least / math.fsum(weights)
            assume(abs(total - top_p) > 1e-9)
            if total >= top_p:
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
    temperature = draw(st.none() | st.floats(0.05, 20) | st.sampled_from([0, 1e-300, 1, 1e9]))
    top_k = draw(st.none() | st.integers(0, shape[-1] + 2))
    return logits, temperature, top_k, draw(st.none() | st.floats(1e-6, 1, exclude_max=True) | st.just(1))


@settings(deadline=None, max_examples=1000)
@given(cases())
def test_definition(case):
    """Temperature, then top-k, then top-p, each with all that tie with the last one kept, on each row, to rounding."""
    logits, *options = case
    before = logits.copy()
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        probs = gpt2.sample_probs(logits, *options)
    assert probs.shape == logits.shape and np.array_equal(logits, before)
    for row, result in zip(logits.reshape(-1, logits.shape[-1]), probs.reshape(-1, logits.shape[-1])):
        np.testing.assert_allclose(result, plain_probs(row.tolist(), *options), rtol=1e-9)


def test_as_hf_transformers():
    """What HF transformers 5.23.0 gives with its warpers for temperature, top-k and top-p, one after the other."""
    probs = gpt2.sample_probs([2.5, -1.0, 0.3, 1.7, -4.2, 0.4, 2.1, -0.6], temperature=2.5, top_k=5, top_p=0.97)
    expected = [0.291989, 0, 0.1211121, 0.2120275, 0, 0.1260547, 0.2488166, 0]
    np.testing.assert_allclose(probs, expected, rtol=0, atol=1e-7)


def test_top_p_of_exactly_what_is_needed():
    """Here nothing is rounded."""
    for top_p, kept in (0.5, [1]), (0.5001, [1, 2]), (0.75, [1, 2]), (0.8, [0, 1, 2, 3]):
        assert np.flatnonzero(gpt2.sample_probs(np.log([1, 4, 2, 1]), top_p=top_p)).tolist() == kept


@pytest.fixture
def sample(model):
    return lambda ids, n=12, **options: gpt2.generate(ids, model[2], model[1]["n_head"], n, **options)


def test_frequencies(sample, model):
    """10,000 draws of the token after "O" spread over the tokens as sample_probs says, and over no others."""
    logits = gpt2.gpt2(PROMPTS[0], **model[2], n_head=model[1]["n_head"])[-1]
    probs = gpt2.sample_probs(logits, 3, top_p=0.9)
    drawn = [sample([PROMPTS[0]] * 1000, 1, temperature=3, top_p=0.9, seed=seed) for seed in range(10)]
    counts, expected = np.bincount(np.ravel(drawn), minlength=len(probs)), 10_000 * probs
    assert counts.sum() == 10_000 and not counts[probs == 0].any()
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected) + 2).all()


def test_large_top_k_and_large_vocabulary():
    """The 1,500 most probable of 120,000 tokens, and no others."""
    params = nested(random_tensors({"n_vocab": 120_000, "n_ctx": 9, "n_embd": 12, "n_head": 3, "n_layer": 1}))
    best_first = np.argsort(-gpt2.gpt2([110_000], **params, n_head=3)[-1])
    drawn = np.ravel(gpt2.generate([[110_000]] * 99, params, 3, 1, temperature=1e9, top_k=1500, seed=1))
    ranks = np.flatnonzero(np.isin(best_first, drawn))
    assert 1400 < ranks.max() < 1500 and drawn.max() > 100_000


MEANINGS = {  # options, others that mean the same; None: greedy
    "none": ({}, None), "temperature 0": ({"temperature": 0}, None), "top_k 1": ({"top_k": 1}, None),
    "temperature 0 with a seed": ({"temperature": 0, "seed": 3}, None), "a tiny top_p": ({"top_p": 1e-9}, None),
    "seed": ({"seed": 3}, {"temperature": 1, "seed": 3}), "text": ({"seed": "0"}, {"temperature": "1.0", "seed": 0}),
    "neutral": ({"seed": 0}, {"temperature": 1, "top_k": 0, "top_p": 1, "seed": 0}),
}  # fmt: skip


@pytest.mark.parametrize("name", MEANINGS)
def test_what_options_mean(sample, name):
    """Each that is left out is neutral, and sampling is not greedy."""
    options, same = MEANINGS[name]
    result, greedy = sample(PROMPTS[2], **options), GOLDEN[2]["greedy"][:12]
    assert result == (sample(PROMPTS[2], **same) if same else greedy) and bool(same) == (result != greedy)


def test_the_texts_of_a_seed_stay_from_version_to_version(sample):
    assert sample(PROMPTS[2:5], temperature=1.1, top_p=0.95, seed=300) == [
        [441, 1111, 258, 387, 70, 305, 504, 462, 269, 904, 550, 259],
        [320, 40, 1066, 477, 308, 496, 1722, 13, 475, 444, 274, 474],
        [1086, 269, 314, 259, 1889, 930, 461, 272, 561, 295, 450, 666],
    ]


def test_other_seeds_or_none_give_other_texts(sample):
    seeds = [0, 1, 5, 256 + 5, 2**32, 2**32 + 5, 2**64 + 5, 10**20, None, None]
    rows = [row for seed in seeds for row in sample([PROMPTS[2]] * 3, temperature=1.2, seed=seed)]
    assert len({tuple(ids) for ids in rows}) == 3 * len(seeds)


@pytest.mark.parametrize("options", [{}, {"temperature": 1, "seed": 2}], ids=["greedy", "sampled"])
def test_a_text_does_not_depend_on_the_batch(options):
    """It is drawn by the number of its prompt, also in a later batch."""
    prompts = ["Once", "", "O", "Once", "The", "Once upon", "O"]
    texts = [gpt2.main(prompts, 20, "2M", batch_size=batch_size, **options) for batch_size in (1, 3, 32)]
    assert texts[0] == texts[1] == texts[2] and (texts[0][0] == texts[0][3]) == (not options)


def test_the_steps_end_when_all_rows_have_had_the_stop_id(model, sample):
    """Until then every row goes on as if nothing had happened."""
    _, hparams, params = model
    comma, rows = GOLDEN[0]["greedy"][2], sample(PROMPTS[:3], 40)
    needed = max(row.index(comma) for row in rows) + 1
    steps = [*gpt2.generate_steps(PROMPTS[:3], params, hparams["n_head"], 40, stop_id=comma)]
    assert np.transpose(steps).tolist() == [row[:needed] for row in rows] and needed < 40


BAD = {
    "temperature": [-1, math.nan, math.inf, "hot", "", [1], "True"],
    "top_k": [-1, 1.5, "1.5", "many", math.nan],
    "top_p": [0, -0.1, 1.0000001, 90, math.nan, "most"],
    "seed": [-1, 0.5, "luck"],
    "n_tokens_to_generate": [-1, 1.5, "1.5", "many", math.inf],
    "batch_size": [0, -1, 1.5, "all"],
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options(sample, name):
    """What makes no sense is refused, by name and value, before anything is loaded."""
    for value in BAD[name]:
        with pytest.raises(ValueError, match=f"^{name} must .* not {re.escape(repr(value))}$"):
            gpt2.main("O", models_dir="nowhere", **{name: value})
        if name not in ("batch_size", "n_tokens_to_generate"):
            with pytest.raises(ValueError, match=name):
                sample(PROMPTS[0], **{name: value})
