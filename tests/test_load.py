"""The loader: the weights are those that were written, mapped or read, and nothing damaged is believed."""

import itertools
import json
import mmap
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import GOLDEN, ROOT, error_of, random_tensors, run, write_checkpoint

import encoder
import utils

ODD = {"n_vocab": 1003, "n_ctx": 64, "n_embd": 36, "n_head": 3, "n_layer": 11}
DATA, INDEX = "model.ckpt.data-00000-of-00001", "model.ckpt.index"
FILES = ["checkpoint", "hparams.json", "encoder.json", "vocab.bpe", INDEX, DATA]


def write_model(folder, tensors, order=sorted):
    """A model of the sizes ODD; its vocabulary: every byte, n_vocab - 257 pairs of letters, and <|endoftext|>."""
    write_checkpoint(folder, ODD, tensors, order)
    characters = list(encoder.bytes_to_unicode().values())
    merges = list(itertools.islice(itertools.product(characters[:32], repeat=2), ODD["n_vocab"] - 257))
    pieces = [*characters, *map("".join, merges), "<|endoftext|>"]
    (folder / "encoder.json").write_text(json.dumps({piece: id for id, piece in enumerate(pieces)}))
    (folder / "vocab.bpe").write_text("\n".join(["#version: 0.2", *map(" ".join, merges), ""]), "utf-8")


def flat(params, prefix="model"):
    """The nested dict of weights as {name in the checkpoint: array}."""
    if isinstance(params, np.ndarray):
        return {prefix: params}
    inner = {f"h{i}": block for i, block in enumerate(params["blocks"])} if "blocks" in params else {}
    inner |= {key: value for key, value in params.items() if key != "blocks"}
    return {name: array for key, value in inner.items() for name, array in flat(value, f"{prefix}/{key}").items()}


def is_mapped(array):
    while isinstance(array, np.ndarray):
        array = array.base
    return isinstance(array, mmap.mmap)


def assert_holds(params, tensors, mapped=True):
    """The weights are exactly `tensors`, in float32, all mapped or not all."""
    arrays = flat(params)
    assert arrays.keys() <= tensors.keys() and len(arrays) == 4 + 12 * len(params["blocks"])
    for name, array in arrays.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, tensors[name], err_msg=name)
    assert all(map(is_mapped, arrays.values())) == mapped


@pytest.fixture
def load(tmp_path, capfd):
    """load(): the weights of tmp_path/models/<the only one>, and whether TensorFlow has checked them."""

    def load():
        [name] = os.listdir(tmp_path / "models")
        capfd.readouterr()
        _, _, params = utils.load_encoder_hparams_and_params(name, tmp_path / "models")
        said = capfd.readouterr().err
        assert said in ("", f"checking {name} …\n")
        return params, bool(said)

    return load


@pytest.fixture
def note(models, load):
    """What the first run, which checks, leaves beside the files of 2M, for later runs."""
    before = set(os.listdir(models / "2M"))
    assert load()[1] and not load()[1]
    [name] = set(os.listdir(models / "2M")) - before
    return models / "2M" / name


# ---- What was written is what is loaded -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("order", "extra", "tail", "mapped"),
    [
        (sorted, [], b"", True),
        (lambda names: sorted(names, reverse=True), [], b"", False),
        (sorted, ["global_step"], b"", False),
        (sorted, ["model/wte/Adam", "zzz"], b"", False),
        (sorted, [], b"more", False),
    ],
    ids=["as released", "reversed", "a tensor before", "tensors between", "bytes behind"],
)
def test_every_layout(tmp_path, load, order, extra, tail, mapped):
    tensors = random_tensors(ODD) | {name: np.ones((3, 5), np.float32) for name in extra}
    folder = tmp_path / "models/odd"
    write_model(folder, tensors, order)
    with open(folder / DATA, "ab") as f:
        f.write(tail)
    for expected_check in True, not mapped, not mapped:
        params, checked = load()
        assert_holds(params, tensors, mapped)
        assert checked == expected_check
    assert sum(f.stat().st_size for f in folder.iterdir()) < 1.2 * (folder / DATA).stat().st_size  # no second copy
    encoder_, hparams, _ = utils.load_encoder_hparams_and_params("odd", tmp_path / "models")
    assert hparams == ODD and encoder_.decode(encoder_.encode("any text 🙂")) == "any text 🙂"


def test_a_checkpoint_of_another_name(models, load):
    for suffix in ".index", ".data-00000-of-00001":
        os.rename(models / f"2M/model.ckpt{suffix}", models / f"2M/step-10{suffix}")
    (models / "2M/checkpoint").write_text('model_checkpoint_path: "/elsewhere/step-10"\n')
    assert load()[1] and not load()[1]


def command(models, *before):
    """A process that runs the command on the 2M of a folder and then says which of the slow imports it has done."""
    code = [*before, f"sys.argv = ['gpt2.py', 'Once', '--model_size=2M', {f'--models_dir={models}'!r}]"]
    code += ["utils.run(gpt2.cli)", "print(*sorted(sys.modules.keys() & {'tensorflow', 'requests', 'fire'}))"]
    code = "\n".join(["import gpt2, sys, utils", *code])
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, capture_output=True, encoding="utf-8")


def test_only_the_first_run_imports_tensorflow(models):
    missing = error_of(command(models, "sys.modules['tensorflow'] = None"))
    assert "pip install tensorflow" in missing
    for said in "checking 2M …\n", "":
        result = command(models)
        text, modules = result.stdout.split("\n")[:-1]
        assert (result.returncode, text, result.stderr) == (0, GOLDEN[1]["text"], said)
        assert ("tensorflow" in modules) if said else (modules == "")


def test_two_first_runs_at_once(models):
    with ThreadPoolExecutor() as threads:
        runs = list(threads.map(lambda _: run("Once", "--model_size=2M", f"--models_dir={models}"), range(2)))
    for result in [*runs, last := run("Once", "--model_size=2M", f"--models_dir={models}")]:
        assert (result.returncode, result.stdout) == (0, GOLDEN[1]["text"] + "\n")
    assert last.stderr == ""


def test_the_models_folder_is_the_one_beside_the_code(tmp_path):
    result = run("Once", "--model_size=2M", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (0, GOLDEN[1]["text"] + "\n")


def test_an_unknown_model(models):
    (models / "a folder").mkdir()
    (models / "a file").touch()
    line = error_of(run("Once", "--model_size=3M", f"--models_dir={models}"))
    assert re.findall(r"\d+M\b|a f\w+", line) == ["3M", "2M", "124M", "355M", "774M", "1558M"]
