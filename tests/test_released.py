"""The proof on OpenAI's own weights: what the released models are known to say, word for word.

Each model in the models folder, or in GPT2_MODELS_DIR, is held to outputs that picoGPT and transformers published. The
same code holds the bundled model to its golden file, so it is known to be able to fail.
"""

import os
from pathlib import Path

import pytest
from conftest import GOLDEN, ROOT

import gpt2
import utils

MODELS_DIR = Path(os.environ.get("GPT2_MODELS_DIR") or ROOT / "models")
TURING = "Alan Turing theorized that computers would one day become"  # README of https://github.com/jaymody/picoGPT
BECOME = """ the most powerful machines on the planet.

The computer is a machine that can perform complex calculations, and it can perform these calculations in a way that is very similar to the human brain.
"""
DOG = [373, 1043, 287, 257, 2214, 1474, 262, 16246, 286, 2688, 290, 2688, 27262, 13, 198, 198, 464, 3290]

TEXTS = [("124M", TURING, BECOME), *[("2M", golden["prompt"], golden["text"]) for golden in GOLDEN]]
IDS = [("124M", [464, 3290], DOG), *[("2M", golden["ids"], golden["greedy"]) for golden in GOLDEN]]


def folder_of(model_size):
    """The models folder with a model in it; the test is skipped if it is not there."""
    if model_size == "2M":
        return ROOT / "models"
    if not (MODELS_DIR / model_size / utils.FILES[-1]).exists():
        pytest.skip(f'{model_size} is not there; this fetches it: python gpt2.py "{TURING}" --model_size {model_size}')
    return MODELS_DIR


def holds_text(model_size, prompt, text):
    return gpt2.main(prompt, 40, model_size, folder_of(model_size)) == text


def holds_ids(model_size, ids, new):
    _, hparams, params = utils.load_encoder_hparams_and_params(model_size, folder_of(model_size))
    return gpt2.generate(ids, params, hparams["n_head"], len(new)) == new


@pytest.mark.parametrize(("model_size", "prompt", "text"), TEXTS, ids=lambda value: str(value)[:12])
def test_published_text(model_size, prompt, text):
    assert holds_text(model_size, prompt, text)


@pytest.mark.parametrize(("model_size", "ids", "new"), IDS, ids=lambda value: str(value)[:12])
def test_published_ids(model_size, ids, new):
    assert holds_ids(model_size, ids, new)


def test_it_can_fail():
    """One id or one letter changed, and the same code says no."""
    golden = GOLDEN[1]
    for i in range(0, 40, 13):
        changed = list(golden["greedy"])
        changed[i] ^= 1
        assert not holds_ids("2M", golden["ids"], changed)
    assert not holds_text("2M", golden["prompt"], golden["text"].replace("king", "kind"))
