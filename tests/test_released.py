"""The proof on OpenAI's own weights: what the released models are made of and known to say, word for word.

Each model in the models folder, or in GPT2_MODELS_DIR, is held to its hashes and to outputs that picoGPT and
transformers published. The same code holds the bundled model to its golden file, so it is known to be able to fail.
"""

import hashlib
import os
from pathlib import Path

import numpy as np
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
DIGESTS = {  # of data files and indexes: no public ones were found for 355M and above
    f"2M/{utils.DATA}": "50ecec854c37892224624513065e7c3e8fe98c60fe698879207e9da94f2796f7",
    f"124M/{utils.DATA}": "2060c885360cc0cf41d7a6dbc4d24b5127aae20260c8b5ae521b5a6578407118",
    "124M/model.ckpt.index": "71916f763f9746f9b2a06b12d91996cf1084ae008d0424543d39391c5f2dc687",
}
SAYS = [("124M", TURING, BECOME), *[("2M", golden["prompt"], golden["text"]) for golden in GOLDEN]]
SAYS += [("124M", [464, 3290], DOG), *[("2M", golden["ids"], golden["greedy"]) for golden in GOLDEN]]


def folder_of(size):
    if size != "2M" and not (MODELS_DIR / size / utils.DATA).exists():
        pytest.skip(f'{size} is not there; this fetches it: python gpt2.py "{TURING}" --model_size {size}')
    return ROOT / "models" if size == "2M" else MODELS_DIR


def says(size, prompt, new):
    if isinstance(prompt, str):
        return gpt2.main(prompt, 40, size, folder_of(size)) == new
    _, hparams, params = utils.load_encoder_hparams_and_params(size, folder_of(size))
    return gpt2.generate(prompt, params, hparams["n_head"], len(new)) == new


@pytest.mark.parametrize(("size", "prompt", "new"), SAYS, ids=lambda value: str(value)[:12])
def test_what_a_model_is_known_to_say(size, prompt, new):
    assert says(size, prompt, new)
    if size == "2M":  # one id or one letter changed, and the same code says no
        assert not says(size, prompt, new.replace("e", "a", 1) if isinstance(new, str) else [*new[:-1], new[-1] ^ 1])


@pytest.mark.parametrize("path", DIGESTS)
def test_hashes(path):
    assert utils.SHA256.get(path, DIGESTS[path]) == DIGESTS[path]
    file = np.memmap(folder_of(path.split("/")[0]) / path, np.uint8, "r")
    assert hashlib.sha256(file).hexdigest() == DIGESTS[path]


def test_the_address_and_the_numbers_of_all_four():
    numbers = {"124M": [768, 12, 12], "355M": [1024, 16, 24], "774M": [1280, 20, 36], "1558M": [1600, 25, 48]}
    assert [[*row.values()] for row in utils.RELEASED.values()] == [[50257, 1024, *row] for row in numbers.values()]
    assert utils.RELEASED.keys() == numbers.keys()
    assert utils.URL == "https://openaipublic.blob.core.windows.net/gpt-2/models"
