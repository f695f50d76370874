"""The proof on OpenAI's own weights: what the released models are made of and known to say, word for word.

Each model in the models folder, or in GPT2_MODELS_DIR, is held to its hashes and to outputs that picoGPT and
transformers published. The same code holds the bundled model to its golden file, and is shown to be able to fail.
"""

import hashlib
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
DOG = " was found in a field near the intersection of West and West Streets.\n\nThe dog"  # tests of transformers
SAYS = [("124M", TURING, 40, BECOME), ("124M", "The dog", 18, DOG)]
SAYS += [("2M", golden["prompt"], 40, golden["text"]) for golden in GOLDEN]
DIGESTS = {  # of data files and indexes: no public ones were found for 355M and above
    f"2M/{utils.DATA}": "50ecec854c37892224624513065e7c3e8fe98c60fe698879207e9da94f2796f7",
    f"124M/{utils.DATA}": "2060c885360cc0cf41d7a6dbc4d24b5127aae20260c8b5ae521b5a6578407118",
    "124M/model.ckpt.index": "71916f763f9746f9b2a06b12d91996cf1084ae008d0424543d39391c5f2dc687",
}


def folder_of(size):
    if size != "2M" and not (MODELS_DIR / size / utils.DATA).exists():
        pytest.skip(f'{size} is not there; this fetches it: python gpt2.py "{TURING}" --model_size {size}')
    return ROOT / "models" if size == "2M" else MODELS_DIR


@pytest.mark.parametrize("size, prompt, n_tokens, text", SAYS, ids=lambda value: str(value)[:12])
def test_what_a_model_is_known_to_say(size, prompt, n_tokens, text):
    assert gpt2.main(prompt, n_tokens, size, folder_of(size)) == text


def test_one_wrong_word_is_noticed():
    with pytest.raises(AssertionError):
        test_what_a_model_is_known_to_say("2M", "Once", 40, GOLDEN[1]["text"].replace("king", "queen"))


@pytest.mark.parametrize("path, digest", DIGESTS.items(), ids=[*DIGESTS])
def test_hashes(path, digest):
    assert utils.SHA256.get(path, digest) == digest
    file = folder_of(path.split("/")[0]) / path
    assert hashlib.sha256(file.read_bytes()).hexdigest() == digest


def test_the_address_and_the_numbers_of_all_four():
    numbers = {"124M": (768, 12, 12), "355M": (1024, 16, 24), "774M": (1280, 20, 36), "1558M": (1600, 25, 48)}
    assert {size: (h["n_embd"], h["n_head"], h["n_layer"]) for size, h in utils.RELEASED.items()} == numbers
    assert {(h["n_vocab"], h["n_ctx"]) for h in utils.RELEASED.values()} == {(50257, 1024)}
    assert utils.URL == "https://openaipublic.blob.core.windows.net/gpt-2/models"
