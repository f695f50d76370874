"""The loader: the weights are those that were written, mapped or read, and nothing damaged is believed."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import GOLDEN, ROOT, error_of, nested, random_tensors, run, write_checkpoint

import utils

ODD = {"n_vocab": 2048, "n_ctx": 64, "n_embd": 36, "n_head": 3, "n_layer": 11}  # with the vocabulary of 2M
DATA, INDEX = "model.ckpt.data-00000-of-00001", "model.ckpt.index"


def assert_holds(params, hparams, tensors):
    """The weights are exactly `tensors` (which may have others, too), in float32."""
    np.testing.assert_equal(params, nested({name: tensors[name] for name in utils.tensor_shapes(hparams)}))
    assert params["wte"].dtype == params["blocks"][-1]["ln_2"]["b"].dtype == np.float32


@pytest.fixture
def load(models, capfd):
    """load(): the weights of 2M, and what is said meanwhile."""
    load = utils.load_encoder_hparams_and_params
    return lambda: [capfd.readouterr(), load("2M", models)[2], capfd.readouterr().err][1:]


@pytest.fixture
def note(models, load):
    """What the first run, which checks, leaves beside the files of 2M, for later runs."""
    before = set(os.listdir(models / "2M"))
    assert (load()[1], load()[1]) == ("checking 2M …\n", "")
    [name] = set(os.listdir(models / "2M")) - before
    return models / "2M" / name


LAYOUTS = {  # the order of the tensors, others between them, bytes behind them
    "as released": (sorted, [], b""),
    "reversed": (lambda names: sorted(names, reverse=True), [], b""),
    "tensors between": (sorted, ["global_step", "model/wte/Adam", "zzz"], b""),
    "bytes behind": (sorted, [], b"more"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(models, load, layout):
    """As released: checked once and mapped. Others are checked and read every time."""
    order, extra, tail = LAYOUTS[layout]
    for seed in range(2):  # the second time over the first, in files of the same size
        tensors = random_tensors(ODD, seed) | {name: np.ones((3, 5), np.float32) for name in extra}
        write_checkpoint(models / "2M", ODD, tensors, order)
        (models / "2M" / DATA).write_bytes((models / "2M" / DATA).read_bytes() + tail)
        for number in range(3):
            params, said = load()
            assert_holds(params, ODD, tensors)
            assert said == ("" if number and layout == "as released" else "checking 2M …\n")
            assert params["wte"].flags.writeable == (layout != "as released")


def test_a_checkpoint_of_another_name(models, load):
    for suffix in ".index", ".data-00000-of-00001":
        os.rename(models / f"2M/model.ckpt{suffix}", models / f"2M/step-10{suffix}")
    (models / "2M/checkpoint").write_text('model_checkpoint_path: "/elsewhere/step-10"\n')
    assert (load()[1], load()[1]) == ("checking 2M …\n", "")


def test_only_the_first_run_imports_tensorflow(models):
    def command(*before):
        slow = "print(not {'requests', 'tensorflow', 'numpy.random'}.isdisjoint(sys.modules))"
        code = "; ".join(["import gpt2, sys, utils", *before, "utils.run(gpt2.cli)", slow])
        args = [sys.executable, "-c", code, "Once", "--model_size=2M", f"--models_dir={models}"]
        return subprocess.run(args, cwd=ROOT, check=False, capture_output=True, encoding="utf-8")

    assert "pip install" in error_of(command("sys.modules['tensorflow'] = None"))
    for is_imported, said in (True, "checking 2M …\n"), (False, ""):
        result = command()
        assert (result.stdout, result.stderr) == (f"{GOLDEN[1]['text']}\n{is_imported}\n", said)


def test_the_models_folder_is_the_one_beside_the_code(tmp_path):
    result = run("Once", "--model_size=2M", cwd=tmp_path)
    assert (result.stdout, result.stderr) == (GOLDEN[1]["text"] + "\n", "")


CHANGES = {
    "touched data": lambda note: os.utime(note.parent / DATA),
    "touched index": lambda note: os.utime(note.parent / INDEX),
    "copied": lambda note: os.system(f"cd {note.parent} && mkdir new && cp -p model* new && mv new/* . && rmdir new"),
    "part of a note": lambda note: note.write_bytes(note.read_bytes()[:-1]),
    "note of others": lambda note: note.write_bytes(note.read_bytes().replace(b"7345152", b"7345153")),
    "no text": lambda note: note.write_bytes(b"\xff\xfe"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_checked_again_once(model, load, note, change):
    CHANGES[change](note)
    params, said = load()
    assert (said, load()[1]) == ("checking 2M …\n", "")
    np.testing.assert_equal(params, model[2])


def test_a_note_that_cannot_be_written_is_no_error(model, load, note):
    note.unlink()
    note.symlink_to("/none/note")
    for _ in range(2):
        params, said = load()
        np.testing.assert_equal(params, model[2])
        assert said.startswith("checking 2M …\n") and str(note) in said


FLIP = lambda match: bytes([match[0][0] ^ 16])
LAST_TOKEN, LAST_MERGE = ("encoder.json", rb', "[^"]+": 2046', b""), ("vocab.bpe", rb"[^\n]+\n\Z", b"")
DAMAGE = [  # what the message must have; and what happens: in this file, this pattern is replaced by that
    *((name, (name, rb"\A.*", b"")) for name in ("checkpoint", "hparams.json", "encoder.json", "vocab.bpe")),
    (DATA[10:], (DATA, rb".\Z", b"")),
    *((DATA[10:], (DATA, pattern, FLIP)) for pattern in (rb"\A.", rb".\Z")),
    (INDEX, (INDEX, rb"ln_f", b"ln_g")),
    ("hparams.json.*n_ctx", ("hparams.json", rb'"n_ctx": 256, ', b"")),
    *(("hparams.json", ("hparams.json", rb": 6}", new)) for new in (b": 0}", b": 5}", b": 7}")),
    *(("hparams.json", ("hparams.json", *change)) for change in ((rb"144", b"144.0"), (rb": 4,", b": 5,"))),
    ("hparams.json", ("hparams.json", rb"256(.*)6", rb"1997\g<1>5")),  # a layer less, and as many positions more
    *((change[0], change) for change in (LAST_TOKEN, LAST_MERGE)),
    ("2047 tokens", LAST_TOKEN, LAST_MERGE),
]


@pytest.mark.parametrize("name", ["checkpoint", "hparams.json", "encoder.json", "vocab.bpe", INDEX, DATA])
def test_a_missing_file_is_named(models, load, note, name):
    (models / "2M" / name).unlink()
    with pytest.raises((ValueError, OSError), match="no model '2M'" if name == "checkpoint" else name):
        load()


@pytest.mark.parametrize(("words", "damage"), [(words, damage) for words, *damage in DAMAGE])
def test_a_damaged_file_is_named(models, load, note, words, damage):
    """That it was whole when it was checked is no help, even if the times of change are set back."""
    for name, pattern, new in damage:
        path, times = models / "2M" / name, (models / "2M" / name).stat()
        data, n_found = re.subn(pattern, new, path.read_bytes(), count=1, flags=re.DOTALL)
        assert n_found == 1
        path.write_bytes(data)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises((ValueError, OSError), match=words):
        load()


def test_a_mistake_on_the_command_line_is_one_line(models):
    (models / "a folder").mkdir()
    (models / "a file").touch()
    line = error_of(run("Once", "--model_size=3M", f"--models_dir={models}"))
    assert re.findall(r"\d+M\b|a f\w+", line) == ["3M", "2M", "124M", "355M", "774M", "1558M"]
    os.truncate(models / "2M" / DATA, 9)
    assert DATA[10:] in error_of(run("Once", "--model_size=2M", f"--models_dir={models}"))


@pytest.mark.parametrize("other", [{}, {"model/h10/mlp/c_fc/w": np.zeros((144, 36), np.float32)}])
def test_a_tensor_that_does_not_fit_is_named(models, load, other):
    """It is missing, or it has another shape of the same size."""
    tensors = random_tensors(ODD) | {"zzz": np.zeros(36 * 144, np.float32)}
    tensors.pop("model/h10/mlp/c_fc/w")
    write_checkpoint(models / "2M", ODD, tensors | other)
    with pytest.raises(ValueError, match="model/h10/mlp/c_fc/w.*144"):
        load()
