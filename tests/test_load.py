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
OWN = "own [v2]"  # the folder of a model that nobody knows
VOCABULARY, INDEX, DATA = ["encoder.json", "vocab.bpe"], "model.ckpt.index", "model.ckpt.data-00000-of-00001"
FILES, NOTE = ["hparams.json", *VOCABULARY, INDEX, DATA], "model.ckpt.checked.json"  # of the first run for later ones


@pytest.fixture
def models(models):
    """Another model is there, too."""
    write_checkpoint(models / OWN, ODD, random_tensors(ODD))
    for name in VOCABULARY:
        (models / OWN / name).write_bytes((models / "2M" / name).read_bytes())
    return models


@pytest.fixture
def load(models, monkeypatch, capfd):
    """load(name): the weights, and what is said meanwhile. Afterwards no file is open, and the folder is the same."""

    def load(name="2M"):
        capfd.readouterr()
        return utils.load_encoder_hparams_and_params(name, ".")[2], capfd.readouterr().err

    monkeypatch.chdir(models)
    n_open = len(os.listdir("/dev/fd"))
    yield load
    assert os.path.samefile(os.getcwd(), models) and len(os.listdir("/dev/fd")) == n_open


# The order of the tensors, others between them, their type, bytes behind them.
LAYOUTS = [(ODD, sorted, [], "f4", b""), (utils.HPARAMS["2M"], sorted, [], "f4", b"")]  # as released
LAYOUTS += [(ODD, sorted, [], "f2", b""), (ODD, sorted, [], "f4", b"more"), (ODD, reversed, [], "f4", b"")]
LAYOUTS += [(ODD, sorted, ["global_step", "model/wte/Adam", "zzz"], "f4", b"")]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(models, load, layout):
    """As released: checked once and mapped. Others are checked and read every time."""
    (hparams, order, extra, kind, tail), is_mapped = layout, layout in LAYOUTS[:2]
    for seed in range(2):  # the second time over the first, in files of the same size
        tensors = {name: tensor.astype(kind) for name, tensor in random_tensors(hparams, seed).items()}
        others = {name: np.ones((3, 5), kind) for name in extra}
        write_checkpoint(models / OWN, hparams, tensors | others, lambda names: list(order(sorted(names))))
        (models / OWN / DATA).write_bytes((models / OWN / DATA).read_bytes() + tail)
        for number in range(3):
            params, said = load(OWN)
            np.testing.assert_equal(params, nested(tensors))
            assert params["wte"].dtype == params["blocks"][-1]["ln_2"]["b"].dtype == np.float32
            assert said == ("" if number and is_mapped else f"checking {OWN} …\n")
            assert params["wte"].flags.writeable != is_mapped


CHECKPOINTS = [None, 'model_checkpoint_path: "step-10" all_model_checkpoint_paths: "step-9"']
CHECKPOINTS += [f'model_checkpoint_path: "{path}step-10"' for path in ("/there/", r"C:\\models\\", r"/jos\303\251/")]


@pytest.mark.parametrize("text", CHECKPOINTS)
def test_a_known_model_under_other_names_without_tensorflow(models, model, load, monkeypatch, text):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    os.rename(models / "2M", models / "[x]")
    for suffix in ".index", DATA[10:]:
        os.rename(models / f"[x]/model.ckpt{suffix}", models / f"[x]/step-10{suffix}")
    os.remove(models / "[x]/checkpoint") if text is None else (models / "[x]/checkpoint").write_text(text)
    params, said = load("[x]")
    np.testing.assert_equal(params, model[2])
    assert (said, load("[x]")[1]) == ("checking [x] …\n", "")


@pytest.mark.parametrize("code", ["", "None.why", "raise TypeError('why')", "import why", "raise OSError('why')"])
def test_a_broken_tensorflow_is_named(models, load, monkeypatch, tmp_path, code):
    (tmp_path / "tensorflow.py").write_text(code)
    monkeypatch.delitem(sys.modules, "tensorflow")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="^(?!.*ckpt).*tensorflow.*(train|why)"):
        load(OWN)


def test_the_command_imports_tensorflow_once_and_for_unknown_models_only(models):
    code = "import gpt2, sys, utils; utils.run(gpt2.cli); "
    code += "print(sorted({'requests', 'tensorflow', 'numpy.random'}.intersection(sys.modules)))"
    (models / "prompts").write_text("Once\n")
    for name, prompt in ("2M", "Once"), (OWN, "--prompts_file=~/prompts"):
        args = [sys.executable, "-c", code, prompt, f"--model_size={name}", "--models_dir=~"]
        options = {"cwd": ROOT, "env": {**os.environ, "HOME": str(models)}, "capture_output": True}
        first, second = (subprocess.run(args, check=True, encoding="utf-8", **options) for _ in range(2))
        assert (first.stderr, second.stderr) == (f"checking {name} …\n", "")
        text, modules = first.stdout.splitlines()
        assert second.stdout == f"{text}\n[]\n" and ("tensorflow" in modules if name == OWN else modules == "[]")
        assert text == GOLDEN[1]["text"] or text.startswith('{"prompt": "Once", "text": ')


CHANGES = {"copied": lambda note: os.system(f"cd {note.parent} && mkdir x && cp -p m* x && mv x/* . && rmdir x")}
CHANGES["of others"] = lambda note: note.write_bytes(note.read_bytes().replace(b"7345152", b"7345153"))
CHANGES |= {"half": lambda note: os.truncate(note, 99), "no text": lambda note: note.write_bytes(b"\xff\xfe")}


@pytest.mark.parametrize("change", [*FILES, *CHANGES])
def test_what_has_changed_is_checked_again_once(models, model, load, change):
    load()
    CHANGES[change](models / "2M" / NOTE) if change in CHANGES else os.utime(models / "2M" / change)
    params, said = load()
    assert (said, load()[1]) == ("checking 2M …\n", "")
    np.testing.assert_equal(params, model[2])


@pytest.mark.parametrize("name", FILES)
def test_what_changes_while_it_is_checked_is_checked_again(models, load, monkeypatch, name):
    write = sys.stderr.write
    monkeypatch.setattr(sys.stderr, "write", lambda text: [write(text), os.utime(models / "2M" / name)])
    assert load()[1] == load()[1] == "checking 2M …\n"


@pytest.mark.parametrize("place", [lambda note: note.symlink_to("/none/note"), lambda note: note.mkdir()])
def test_a_note_that_cannot_be_read_or_written_is_no_error(models, model, load, place):
    place(models / "2M" / NOTE)
    for _ in range(2):
        params, said = load()
        np.testing.assert_equal(params, model[2])
        assert said.startswith("checking 2M …\n") and NOTE in said


FLIP = lambda match: bytes([match[0][0] ^ 16])
DAMAGE = [(name, rb"\A.*", new) for name in (*FILES, "checkpoint") for new in (b"", b"<p>", None)]  # None: missing
DAMAGE += [(DATA, rb".\Z", b""), (DATA, rb"\A.", FLIP), (DATA, rb".\Z", FLIP), (INDEX, rb"ln_f", b"ln_g")]
DAMAGE += [("hparams.json", rb'"n_ctx": \d+, ', b""), ("hparams.json", rb'"n_head": \d', b'"n_head": 7')]
DAMAGE += [("hparams.json", rb": \d+}", new) for new in (b": 0}", b": -1}", b": 5}", b": 12}", b": 6.0}")]
A_LAYER_LESS = (b"1997", b"5"), (b"509", b"10")  # and as many positions more, so that the size is the same
DAMAGE += [("hparams.json", rb'("n_ctx": )\d+(.*: )\d+}', rb"\g<1>%b\g<2>%b}" % numbers) for numbers in A_LAYER_LESS]
DAMAGE += [("vocab.bpe", rb"W h\n\Z", b"W j\n"), ("vocab.bpe", rb"[^\n]+\n\Z", b""), ("encoder.json", b'"!"', b'"!!"')]
DAMAGE += [("encoder.json", b"endoftext", b"end"), ("encoder.json", rb', "[^"]+": 2046', b"")]
DAMAGE += [("encoder.json", b"2046", new) for new in (b"2045", b"2048", b'"2046"')]


@pytest.mark.parametrize("model_size", ["2M", OWN])
@pytest.mark.parametrize(("name", "pattern", "new"), DAMAGE)
def test_a_damaged_file_is_named(models, load, monkeypatch, model_size, name, pattern, new):
    """That it was whole when it was checked is no help, even if the time of change is set back."""
    monkeypatch.setitem(sys.modules, "tensorflow", None if model_size == "2M" else sys.modules["tensorflow"])
    load(model_size)
    (models / model_size / "step-9.index").touch()  # so that it takes the file named checkpoint to tell which
    path, times = models / model_size / name, (models / model_size / name).stat()
    damaged, n_found = re.subn(pattern, new or b"", path.read_bytes(), count=1, flags=re.DOTALL)
    assert n_found == 1
    path.write_bytes(damaged)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns)) if new is not None else path.unlink()
    with pytest.raises((ValueError, OSError), match=name.replace("model.ckpt.data", r"\.data")):
        load(model_size)


def test_the_weights_alone(models, monkeypatch):
    """No other file is needed, and the hparams must be the right ones, even if others give the same size."""
    monkeypatch.setenv("HOME", str(models))
    for name in FILES[:3]:
        os.remove(models / OWN / name)
    params = utils.load_gpt2_params_from_tf_ckpt(f"~/{OWN}/model.ckpt", ODD)
    np.testing.assert_equal(params, nested(random_tensors(ODD)))
    utils.load_gpt2_params_from_tf_ckpt("~/2M/model.ckpt", utils.HPARAMS["2M"])
    with pytest.raises(ValueError):
        utils.load_gpt2_params_from_tf_ckpt("~/2M/model.ckpt", utils.HPARAMS["2M"] | {"n_ctx": 1997, "n_layer": 5})


@pytest.mark.parametrize("other", [{}, {"model/h10/mlp/c_fc/w": np.zeros((144, 36), np.float32)}])
def test_a_tensor_that_does_not_fit_is_named(models, load, other):
    """It is missing, or it has another shape of the same size."""
    tensors = random_tensors(ODD) | {"zzz": np.zeros(36 * 144, np.float32)}
    tensors.pop("model/h10/mlp/c_fc/w")
    write_checkpoint(models / OWN, ODD, tensors | other)
    with pytest.raises(ValueError, match="model/h10/mlp/c_fc/w.*144"):
        load(OWN)


def test_the_folder_is_the_one_beside_the_code_and_a_mistake_is_one_line(models, tmp_path):
    result = run("Once", "--model_size=2M", cwd=tmp_path)
    assert (result.stdout, result.stderr) == (GOLDEN[1]["text"] + "\n", "")
    (models / "a folder").mkdir()
    line = error_of(run("Once", "--model_size=3M", f"--models_dir={models}"))
    assert re.findall(r"own|\d+M\b|a f\w+", line) == ["3M", "2M", "own", "124M", "355M", "774M", "1558M"]
    with pytest.raises(ValueError, match="124M, 355M, 774M, 1558M"):
        utils.download_gpt2_files("3M", models)
    (tmp_path / "tensorflow.py").touch()
    line = error_of(run("Once", f"--model_size={OWN}", f"--models_dir={models}", env={"PYTHONPATH": str(tmp_path)}))
    assert re.search("tensorflow.*pip install.*(tensorflow|requirements)", line)
