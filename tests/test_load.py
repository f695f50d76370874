"""The loader: what is plainly the model is mapped, TensorFlow reads the rest, and what is damaged or odd is named."""

import json
import mmap
import os
import re
import shutil
import sys
from unittest.mock import Mock

import numpy as np
import pytest
from conftest import GOLDEN, ROOT, nested, random_tensors, write_checkpoint
from server import index_of

import encoder
import gpt2
import gpt2_pico
import utils

ODD = {"n_vocab": 2048, "n_ctx": 64, "n_embd": 36, "n_head": 3, "n_layer": 11}  # with the vocabulary of 2M
INDEX, DATA = "model.ckpt.index", utils.DATA
load = utils.load_encoder_hparams_and_params


def add_model(folder, hparams, vocabulary=ROOT / "models/2M"):
    """A model as OpenAI laid it out, with random weights."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("encoder.json", "vocab.bpe"):
        shutil.copy(vocabulary / name, folder)
    (folder / "hparams.json").write_text(json.dumps(hparams))
    (folder / "checkpoint").write_text('model_checkpoint_path: "model.ckpt"\n')
    (folder / INDEX).write_bytes(index_of(hparams))
    (folder / DATA).write_bytes(b"".join(tensor.tobytes() for _, tensor in sorted(random_tensors(hparams).items())))


def change(path, pattern, new):
    """Put something in the place of what a pattern finds in a file, which must be there."""
    content, n_found = re.subn(pattern, new, path.read_bytes(), flags=re.DOTALL)
    assert n_found
    path.write_bytes(content)


@pytest.mark.parametrize("writer", ["TensorFlow", "anybody"])
def test_the_float32_weights_alone_are_mapped_and_need_no_tensorflow(tmp_path, monkeypatch, capfd, writer):
    add_model(tmp_path / "own", ODD)
    if writer == "TensorFlow":
        write_checkpoint(tmp_path / "own", ODD, random_tensors(ODD))
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    capfd.readouterr()
    for _ in range(2):
        params = load("own", tmp_path)[2]
        np.testing.assert_equal(params, nested(random_tensors(ODD)))
        assert not params["wte"].flags.writeable and capfd.readouterr().err == ""
    assert {*os.listdir(tmp_path / "own")} == {*utils.FILES}  # it leaves nothing there


SIZES = {"124M": 497_759_232, "355M": 1_419_292_672, "774M": 3_096_120_320, "1558M": 6_230_444_800}


@pytest.mark.parametrize("size", SIZES)
def test_a_released_model_is_mapped_if_it_has_the_numbers_of_its_name(tmp_path, monkeypatch, vocabulary, size):
    """Its weights are all 0 here, and take no room on the disk."""
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    add_model(tmp_path / size, ODD, vocabulary)
    (tmp_path / size / "hparams.json").write_text(json.dumps(utils.RELEASED[size]))
    (tmp_path / size / INDEX).write_bytes(index_of(utils.RELEASED[size]))
    os.truncate(tmp_path / size / DATA, SIZES[size])
    assert len(load(size, tmp_path)[2]["blocks"]) == utils.RELEASED[size]["n_layer"]
    change(tmp_path / size / "hparams.json", rb'"n_head": \d+', b'"n_head": 4')
    with pytest.raises(ValueError, match=r"hparams\.json.*delete it"):
        load(size, tmp_path)


OTHERS = {  # what else a checkpoint may hold: (the order of the tensors, others among them, their type)
    "another order": (reversed, {}, "f4"),
    "float16": (sorted, {}, "f2"),
    "optimizer state": (sorted, {"global_step": np.ones(1), "model/wte/Adam": np.ones((3, 5))}, "f4"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_is_not_plainly_the_model_is_read_through_tensorflow_each_time(tmp_path, capsys, case):
    order, others, kind = OTHERS[case]
    tensors = {name: tensor.astype(kind) for name, tensor in random_tensors(ODD).items()}
    add_model(tmp_path / "own", ODD)
    write_checkpoint(tmp_path / "own", ODD, {**tensors, **others}, lambda names: [*order(sorted(names))])
    for _ in range(2):
        params = load("own", tmp_path)[2]
        np.testing.assert_equal(params, nested(tensors))
        assert params["wte"].dtype == params["blocks"][10]["ln_2"]["b"].dtype == np.float32
        assert re.fullmatch("[^\n]*tensorflow[^\n]*\n", capsys.readouterr().err, re.IGNORECASE)  # why, and what to do


@pytest.mark.parametrize("other", [{}, {"model/h10/mlp/c_fc/w": np.zeros((144, 36))}], ids=["missing", "144, 36"])
def test_a_tensor_that_does_not_fit_is_named(tmp_path, request, other):
    tensors = {**random_tensors(ODD), "other": np.zeros((36, 144), np.float32)}
    tensors.pop("model/h10/mlp/c_fc/w")
    add_model(tmp_path / "own", ODD)
    write_checkpoint(tmp_path / "own", ODD, {**tensors, **other})
    with pytest.raises(ValueError, match=f"model/h10/mlp/c_fc/w(?!.*None).*{request.node.callspec.id}"):
        load("own", tmp_path)


DAMAGE = {  # (file of 2M, what is in it, what is put in its place)
    **{f"{name} is empty": (name, rb"\A.*", b"") for name in ("encoder.json", "hparams.json", INDEX, DATA)},
    "half an index": (INDEX, rb"\A(.{1300}).*", rb"\1"),
    "an index in another order": (INDEX, rb"\A(.{1300})(.*)", rb"\2\1"),
    "a data file that goes on": (DATA, rb"\Z", b"more"),
    "fewer layers, more positions, the same size": ("hparams.json", rb'(x": )\d+(.*r": )\d+', rb"\g<1>1997\g<2>5"),
    "no n_ctx": ("hparams.json", rb'"n_ctx": \d+, ', b""),
    "heads that do not divide": ("hparams.json", rb'"n_head": \d+', b'"n_head": 7'),
    "no layers": ("hparams.json", rb'"n_layer": \d+', b'"n_layer": 0'),
    "half a layer": ("hparams.json", rb'"n_layer": \d+', b'"n_layer": 6.5'),
    "no end of text": ("encoder.json", b"endoftext", b"end"),
    "an id that is missing": ("encoder.json", rb', "[^"]+": 2046', b""),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_or_missing_file_is_named(models, monkeypatch, case):
    name, pattern, new = DAMAGE[case]
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    change(models / "2M" / name, pattern, new)
    with pytest.raises(ValueError, match=rf"({name}|model\.ckpt).*git checkout"):
        load("2M", models)
    (models / "2M" / name).unlink()
    with pytest.raises(ValueError, match=rf"{name}|model\.ckpt|\.index"):
        load("2M", models)


def test_a_data_file_that_cannot_be_mapped_is_named(monkeypatch):
    monkeypatch.setattr(mmap, "mmap", Mock(side_effect=OSError(19, "No such device")))
    with pytest.raises(ValueError, match=f"{DATA}.*No such device"):
        load("2M")


VOCABULARIES = {  # (rows of wte, tokens beside the 2,048, how many ids may be drawn, or what is said)
    "tokens added in both places": (2050, b', "<|user|>": 2048, "<|model|>": 2049}', 2050),
    "rows up to a round number": (2100, b"}", 2048),
    "more tokens than rows": (2040, b"}", "(?=.*2,?048)(?=.*2,?040)"),
    "far fewer tokens than rows": (4096, b"}", "(?=.*2,?048)(?=.*4,?096)"),
}


@pytest.mark.parametrize("case", VOCABULARIES)
def test_every_token_may_be_drawn_and_nothing_else(models, case):
    n_vocab, tokens, then = VOCABULARIES[case]
    add_model(models / "own", {**ODD, "n_vocab": n_vocab})
    change(models / "own/encoder.json", rb"}\s*\Z", tokens)
    if isinstance(then, str):
        with pytest.raises(ValueError, match=then):
            load("own", models)
    else:  # each token is as likely as any other
        ids = gpt2.generate([[5]] * 500, load("own", models)[2], ODD["n_head"], 60, temperature=10**6, seed=1)
        assert {*np.ravel(ids)} == {*range(then)}


CHECKPOINTS = {  # what is in the file, by hand or from other machines
    "all_ first": 'all_model_checkpoint_paths: "step-9"\nmodel_checkpoint_path: "model.ckpt"',
    "single quotes and blanks": "  model_checkpoint_path :  'model.ckpt'  ",
    "Windows": '\ufeffall_model_checkpoint_paths: "step-9"\r\nmodel_checkpoint_path: "model.ckpt"\r\n',
    "a path": 'model_checkpoint_path: "/there/model.ckpt"',
    "a path on Windows": r'model_checkpoint_path: "C:\\models\\model.ckpt"',
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_the_checkpoint_says_which_files(models, case):
    (models / "2M/step-9.index").touch()
    (models / "2M/checkpoint").unlink()
    with pytest.raises(ValueError, match=r'(?=.*model\.ckpt)(?=.*step-9).*model_checkpoint_path: "'):
        load("2M", models)
    (models / "2M/checkpoint").write_bytes(CHECKPOINTS[case].encode())
    assert gpt2.main(GOLDEN[1]["prompt"], 40, "2M", models) == GOLDEN[1]["text"]


CHANGES = {  # what may be done to a model's folder
    "renamed": lambda folder: folder.rename(folder.with_name("own [v2] é")),
    "with line ends of Windows": lambda folder: change(folder / "vocab.bpe", b"\n", b"\r\n"),
    "without the last line end": lambda folder: change(folder / "vocab.bpe", rb"\n\Z", b""),
    "without checkpoint": lambda folder: (folder / "checkpoint").unlink(),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_model_runs_though_its_folder_is(models, model, monkeypatch, case):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    CHANGES[case](models / "2M")
    [folder] = models.iterdir()
    assert gpt2.main(GOLDEN[1]["prompt"], 40, folder.name, models) == GOLDEN[1]["text"]
    assert encoder.get_encoder(folder.name, models).bpe_ranks == model[0].bpe_ranks


def test_home_is_where_it_always_is(models, model, monkeypatch):
    for name in ("HOME", "USERPROFILE"):  # the second one is for Windows
        monkeypatch.setenv(name, str(models))
    assert encoder.get_encoder("2M", "~").encoder == model[0].encoder and load("2M", "~")[1] == model[1]
    np.testing.assert_equal(utils.load_gpt2_params_from_tf_ckpt("~/2M/model.ckpt", model[1]), model[2])


MISTAKES = {  # (model_size, models_dir, what is said)
    "a model's own folder": ("124M", "models/2M", "--models_dir .*models --model_size 2M"),
    "a path for a name": ("models/2M", "models", "models_dir.* 2M"),
    "a name that is nowhere": ("3M", "models", "3M(?=.* 2M)(?=.* 124M)(?=.* 1558M)"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_wrong_place_gets_a_hint_and_no_download(models, monkeypatch, case):
    monkeypatch.setattr(utils, "download_gpt2_files", Mock(side_effect=KeyError("it is fetched")))
    monkeypatch.chdir(models.parent)
    size, models_dir, said = MISTAKES[case]
    with pytest.raises(ValueError, match=said):
        load(size, models_dir)


def test_the_default_is_124m_beside_the_code(monkeypatch, tmp_path):
    monkeypatch.setattr(utils, "download_gpt2_files", Mock(side_effect=OSError("no network")))
    monkeypatch.chdir(tmp_path)
    for function in gpt2.main, gpt2.cli, gpt2_pico.main, load:
        with pytest.raises(OSError, match="no network"):
            function(*[] if function is load else ["Once"])
        utils.download_gpt2_files.assert_called_with("124M", ROOT / "models/124M")
