"""Sampling: the probabilities held to the definition and to HF transformers, what is drawn to the probabilities."""

import itertools
import math
import re

import numpy as np
import pytest
from conftest import GOLDEN, nested, random_tensors

import gpt2

PROMPTS = [golden["ids"] for golden in GOLDEN]


def plain_probs(logits, temperature, top_k, top_p):
    """The definition, for one list of logits."""
    scaled = [x / (1 if temperature is None else temperature or 1e-300) for x in logits]
    if top_k:
        least = sorted(scaled)[-top_k:][0]
        scaled = [x if x >= least else -math.inf for x in scaled]
    weights = [math.exp(x - max(scaled)) for x in scaled]
    if top_p and top_p < 1:
        total = 0
        for least in sorted(weights, reverse=True):
            total += least / math.fsum(weights)
            if total >= top_p:
                break
        weights = [weight if weight >= least else 0 for weight in weights]
    return [weight / math.fsum(weights) for weight in weights]


@pytest.mark.parametrize("top_p", [None, 1e-6, 0.1003, 0.7003, 0.9903, 1])
@pytest.mark.parametrize("temperature", [None, 0, 1e-300, 0.05, 0.7, 1, 20, 1e9])
def test_definition(temperature, top_p):
    """Temperature, then top-k, then top-p, each with all that tie with the last one kept, on each row, to rounding."""
    rng = np.random.default_rng(0)
    for shape, top_k in itertools.product([1, 30, (2, 9), (2, 3, 5)], [None, 0, 1, 2, 9, 20, 32]):
        logits = rng.integers(-9, 10, shape).astype(np.float32) / 4  # coarse, so that many are equal
        logits.flags.writeable = False  # they are the caller's
        with np.errstate(over="raise", invalid="raise", divide="raise"):
            probs = gpt2.sample_probs(logits, temperature, top_k, top_p)
        expected = np.apply_along_axis(plain_probs, -1, np.float64(logits), temperature, top_k, top_p)
        np.testing.assert_allclose(probs, expected, rtol=1e-9, err_msg=f"{shape=} {top_k=}", strict=True)


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
    return lambda ids, n=12, **options: gpt2.generate(ids, model[2], 4, n, **options)


def test_frequencies(sample, model):
    """10,000 draws of the token after "O" spread over the tokens as sample_probs says, and over no others."""
    logits = gpt2.gpt2(PROMPTS[0], **model[2], n_head=4)[-1]
    probs = gpt2.sample_probs(logits, 0.8, top_p=0.95)
    drawn = [sample([PROMPTS[0]] * 1000, 1, temperature=0.8, top_p=0.95, seed=seed) for seed in range(10)]
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


def test_options_that_mean_greedy(sample):
    for options in {}, {"temperature": 0}, {"temperature": 0, "seed": 3}, {"top_k": 1}, {"top_p": 1e-9}:
        assert sample(PROMPTS[2], **options) == GOLDEN[2]["greedy"][:12]


def test_options_that_mean_sampling(sample):
    """Each of them alone; what is left out is neutral; numbers may come as text."""
    for options in {"temperature": 1}, {"top_k": 2000}, {"top_p": 0.99}, {"seed": 0}:
        assert len({tuple(row) for row in sample([PROMPTS[2]] * 9, **options)}) > 1
    ids = sample(PROMPTS[2], seed=0)
    assert ids == sample(PROMPTS[2], temperature=1, top_k=0, top_p=1, seed=0)
    assert ids == sample(PROMPTS[2], temperature="1.0", seed="0")


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
    comma, rows = GOLDEN[0]["greedy"][2], sample(PROMPTS[:3], 40)
    needed = max(row.index(comma) for row in rows) + 1
    steps = [*gpt2.generate_steps(PROMPTS[:3], model[2], 4, 40, stop_id=comma)]
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
def test_bad_options(model, name):
    """What makes no sense is refused, by name and value, before anything is loaded."""
    for value in BAD[name]:
        with pytest.raises(ValueError, match=f"^{name} must .* not {re.escape(repr(value))}$"):
            gpt2.main("O", models_dir="nowhere", **{name: value})
        if name != "batch_size":
            with pytest.raises(ValueError, match=name):
                gpt2.generate([1], model[2], 4, **{"n_tokens_to_generate": 3, name: value})
