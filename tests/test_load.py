"""The loader: the weights are those that were written, mapped or read, and nothing damaged is believed."""

import itertools
import json
import mmap
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import GOLDEN, ROOT, error_of, random_tensors, run, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

import encoder
import gpt2
import utils

ODD = {"n_vocab": 1003, "n_ctx": 64, "n_embd": 36, "n_head": 3, "n_layer": 11}
DATA, INDEX, NOTE = "model.ckpt.data-00000-of-00001", "model.ckpt.index", "model.ckpt.checked.json"
FILES = ["checkpoint", "hparams.json", "encoder.json", "vocab.bpe", INDEX, DATA]


def write_vocabulary(folder, n_vocab):
    """encoder.json and vocab.bpe with every byte, n_vocab - 257 pairs of letters, and <|endoftext|>."""
    characters = list(encoder.bytes_to_unicode().values())
    merges = list(itertools.islice(itertools.product(characters[:32], repeat=2), n_vocab - 257))
    pieces = [*characters, *map("".join, merges), "<|endoftext|>"]
    (folder / "encoder.json").write_text(json.dumps({piece: id for id, piece in enumerate(pieces)}))
    (folder / "vocab.bpe").write_text("\n".join(["#version: 0.2", *map(" ".join, merges), ""]), "utf-8")


def write_model(folder, tensors, order=sorted):
    write_checkpoint(folder, ODD, tensors, order)
    write_vocabulary(folder, ODD["n_vocab"])


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


def assert_holds(params, tensors, mapped):
    """The weights are exactly `tensors`, in float32, all mapped or none."""
    arrays = flat(params)
    assert arrays.keys() <= tensors.keys() and len(arrays) == 4 + 12 * len(params["blocks"])
    for name, array in arrays.items():
        assert array.dtype == np.float32 and is_mapped(array) == mapped
        np.testing.assert_array_equal(array, tensors[name], err_msg=name)


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


# ---- What was written is what is loaded ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("order", "extra", "tail", "mapped"),
    [
        (sorted, [], b"", True),
        (lambda names: sorted(names, reverse=True), [], b"", False),
        (lambda names: sorted(names, key=lambda name: (len(name), name)), [], b"", False),
        (sorted, ["global_step"], b"", False),
        (sorted, ["model/wte/Adam", "zzz"], b"", False),
        (sorted, [], b"more", False),
    ],
    ids=["as released", "reversed", "by length", "a tensor before", "tensors between", "bytes behind"],
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
    assert (folder / NOTE).exists() == mapped
    assert sum(f.stat().st_size for f in folder.iterdir()) < 1.2 * (folder / DATA).stat().st_size  # no second copy


def test_the_whole_of_an_odd_model(tmp_path):
    write_model(tmp_path / "odd", random_tensors(ODD))
    encoder_, hparams, params = utils.load_encoder_hparams_and_params("odd", tmp_path)
    assert hparams == ODD
    assert encoder_.decode(encoder_.encode("any text 🙂")) == "any text 🙂"
    ids = gpt2.generate([1002, 5], params, hparams["n_head"], 5)
    assert gpt2.main(encoder_.decode([5]), 5, "odd", tmp_path) == encoder_.decode(gpt2.generate([5], params, 3, 5))
    assert gpt2.gpt2([1002, 5, *ids], **params, n_head=3)[1:-1].argmax(-1).tolist() == ids


def test_a_checkpoint_of_another_name(models, load):
    for suffix in ".index", ".data-00000-of-00001":
        os.rename(models / f"2M/model.ckpt{suffix}", models / f"2M/step-10{suffix}")
    (models / "2M/checkpoint").write_text('model_checkpoint_path: "/elsewhere/step-10"\n')
    assert load()[1] and not load()[1]


def test_only_the_first_run_imports_tensorflow(models):
    code = f"""
import gpt2, sys, utils
sys.argv = ["gpt2.py", "Once", "--model_size", "2M", "--models_dir", {str(models)!r}]
utils.run(gpt2.cli)
print(*sorted(sys.modules.keys() & {{"tensorflow", "requests", "fire"}}))
"""
    for first in True, False:
        result = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, encoding="utf-8"
        )
        text, modules = result.stdout.split("\n")[:-1]
        assert (text, result.stderr) == (GOLDEN[1]["text"], "checking 2M …\n" if first else "")
        assert "tensorflow" in modules if first else modules == ""


def test_two_first_runs_at_once(models):
    with ThreadPoolExecutor() as threads:
        runs = list(threads.map(lambda _: run("Once", "--model_size=2M", f"--models_dir={models}"), range(2)))
    for result in [*runs, last := run("Once", "--model_size=2M", f"--models_dir={models}")]:
        assert (result.returncode, result.stdout) == (0, GOLDEN[1]["text"] + "\n")
    assert last.stderr == ""


# ---- A checkpoint that was checked, and changed -----------------------------------------------------------------------


def with_times_of(path, change):
    """Change a file and set its times to what they were."""
    times = path.stat()
    change()
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_other_weights_of_the_same_size(tmp_path, load):
    folder = tmp_path / "models/odd"
    for seed in range(3):
        if seed < 2:
            write_model(folder, random_tensors(ODD, seed))
        else:
            write_model(tmp_path / "other", random_tensors(ODD, seed))
            for name in DATA, INDEX:
                with_times_of(folder / name, lambda name=name: os.replace(tmp_path / "other" / name, folder / name))
        params, checked = load()
        assert checked
        assert_holds(params, random_tensors(ODD, seed), mapped=True)
        assert not load()[1]


def test_a_bit_that_flips_after_the_check(models, load):
    load()
    with_times_of(models / "2M" / DATA, lambda: change_byte(models / "2M" / DATA, 5_000_000))
    with pytest.raises(ValueError, match=DATA):
        load()
    change_byte(models / "2M" / DATA, 5_000_000)
    params, checked = load()
    assert checked
    assert_holds(params, flat(utils.load_encoder_hparams_and_params("2M", ROOT / "models")[2]), mapped=True)


@pytest.mark.parametrize("name", [DATA, INDEX])
def test_a_touched_file_is_checked_again_once(models, load, name):
    load()
    os.utime(models / "2M" / name)
    assert load()[1] and not load()[1]


@pytest.mark.parametrize("note", [b"", b"{}", b"[]", b"null", b"\xff\xfe", b"[" * 5000, "own start", "other"])
def test_a_note_that_is_not_of_these_files(models, model, load, note):
    load()
    own = (models / "2M" / NOTE).read_bytes()
    other = own.replace(b"7345152", b"7345153")
    assert other != own
    (models / "2M" / NOTE).write_bytes({"own start": own[:-1], "other": other}.get(note, note))
    params, checked = load()
    assert checked
    assert_holds(params, flat(model[2]), mapped=True)
    assert not load()[1]


def test_a_note_is_not_good_for_a_copy(models, load):
    load()
    shutil.copytree(models / "2M", models.parent / "copy")  # the same sizes, bytes and times of change
    shutil.rmtree(models / "2M")
    os.rename(models.parent / "copy", models / "2M")
    assert load()[1]


@pytest.mark.parametrize("obstacle", [os.mkdir, lambda path: os.symlink("/none/note", path)], ids=["folder", "link"])
def test_a_note_that_cannot_be_written_is_no_error(models, model, load, obstacle):
    obstacle(models / "2M" / NOTE)
    for _ in range(2):
        params, checked = load()
        assert checked
        assert_holds(params, flat(model[2]), mapped=True)


# ---- Damaged files ---------------------------------------------------------------------------------------------------


def change_byte(path, position, to=None):
    """Set a byte, or flip one of its bits."""
    data = bytearray(path.read_bytes())
    data[position] = data[position] ^ 16 if to is None else to
    path.write_bytes(data)


def cut(to):
    return lambda path: os.truncate(path, to)


def write(text):
    return lambda path: path.write_bytes(text if isinstance(text, bytes) else text.encode())


def flip(position):
    return lambda path: change_byte(path, position)


def edit(change):
    """A change of a JSON file."""

    def damage(path):
        content = json.loads(path.read_text("utf-8"))
        change(content)
        path.write_text(json.dumps(content))

    return damage


def put(key, value):
    return edit(lambda content: content.update({key: value}))


def lack(key):
    return edit(lambda content: content.pop(key))


def edit_lines(change):
    return lambda path: path.write_text("\n".join(change(path.read_text("utf-8").split("\n"))), "utf-8")


HPARAMS = {"n_vocab": 2048, "n_ctx": 256, "n_embd": 144, "n_head": 4, "n_layer": 6}
DAMAGE = [(name, f"missing {name}", os.remove, []) for name in FILES]
DAMAGE += [
    (DATA, "cut", cut(3_145_728), ["3145728", "7345152"]),
    (DATA, "one byte less", cut(7_345_151), ["7345151", "7345152"]),
    (DATA, "empty", cut(0), ["0", "7345152"]),
    *((DATA, f"flipped at {at}", flip(at), []) for at in (0, 3_000_000, -1)),
    *((INDEX, f"flipped at {at}", flip(at), []) for at in (0, 1000, -1)),
    (INDEX, "cut", cut(1000), []),
    (INDEX, "empty", cut(0), []),
    (INDEX, "no index", write(b"\0" * 2647), []),
    ("checkpoint", "empty", write(""), []),
    ("checkpoint", "no text", write(b"\xff\0"), []),
    *(("hparams.json", repr(text)[:5], write(text), []) for text in ("", "{", "[]", "1", "{}", b"\xff", "[" * 100_000)),
    *(("hparams.json", f"no {key}", lack(key), [key]) for key in HPARAMS),
    *(
        ("hparams.json", f"{key} {value!r}", put(key, value), [])
        for key in HPARAMS
        for value in (0, -1, "6", 1.0 * HPARAMS[key])
    ),
    *(("hparams.json", f"{key} {value}", put(key, value), []) for key, value in [("n_head", 5), ("n_embd", 145)]),
    *(("hparams.json", f"{key} more", put(key, HPARAMS[key] + 4), []) for key in HPARAMS if key != "n_head"),
    *(("hparams.json", f"{key} less", put(key, HPARAMS[key] - 4), []) for key in HPARAMS if key != "n_head"),
    *(("encoder.json", repr(text), write(text), []) for text in ("", "{", "[]", "{}", b"\xff", '{"a": 0}')),
    ("encoder.json", "a token less", edit(lambda content: content.popitem()), []),
    ("encoder.json", "a token more", put("another", 2048), []),
    ("encoder.json", "an id twice", put("a", 5), []),
    (
        "encoder.json",
        "ids from 1",
        edit(lambda content: content.update({key: id + 1 for key, id in content.items()})),
        [],
    ),
    ("encoder.json", "an id that is text", put("a", "64"), []),
    ("encoder.json", "an id that is a float", edit(lambda content: content.update(a=float(content["a"]))), []),
    ("encoder.json", "no <|endoftext|>", edit(lambda content: content.update(x_y_z=content.pop("<|endoftext|>"))), []),
    ("vocab.bpe", "empty", write(""), []),
    ("vocab.bpe", "no text", write(b"\xff"), []),
    ("vocab.bpe", "first merge missing", edit_lines(lambda lines: lines[:1] + lines[2:]), []),
    ("vocab.bpe", "last merge missing", edit_lines(lambda lines: [*lines[:-2], ""]), []),
    ("vocab.bpe", "half", edit_lines(lambda lines: lines[:900]), []),
    ("vocab.bpe", "a merge too many", edit_lines(lambda lines: [*lines[:-1], "q q", ""]), []),
    ("vocab.bpe", "a merge twice", edit_lines(lambda lines: [*lines[:-2], lines[3], ""]), []),
    ("vocab.bpe", "three pieces", edit_lines(lambda lines: [*lines[:-2], "a b c", ""]), []),
    ("vocab.bpe", "one piece", edit_lines(lambda lines: [*lines[:-2], lines[-2].replace(" ", ""), ""]), []),
    ("vocab.bpe", "an empty piece", edit_lines(lambda lines: [*lines[:-2], lines[-2].replace(" ", "  "), ""]), []),
]


@pytest.mark.parametrize(("name", "damage", "words"), [pytest.param(n, d, w, id=f"{n}: {i}") for n, i, d, w in DAMAGE])
def test_a_damaged_file_is_one_line_that_names_it(models, load, name, damage, words):
    load()  # its note must not help
    damage(models / "2M" / name)
    with pytest.raises((ValueError, OSError)) as error:
        load()
    message = str(error.value)
    assert "\n" not in message and name in message and "put a good copy in its place" in message
    assert all(word in message for word in words)


@pytest.mark.parametrize(
    ("name", "damage"), [(DATA, cut(9)), (DATA, flip(9)), (INDEX, flip(9)), ("hparams.json", os.remove)]
)
def test_a_damaged_file_on_the_command_line(models, name, damage):
    damage(models / "2M" / name)
    assert name in error_of(run("Once", "--model_size=2M", f"--models_dir={models}"))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda tensors: tensors.pop("model/h10/mlp/c_fc/b"), id="missing"),
        pytest.param(
            lambda tensors: tensors.update({"model/h10/mlp/c_fc/b": np.zeros(7, np.float32)}), id="other shape"
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(tmp_path, load, change):
    tensors = random_tensors(ODD) | {"zzz": np.zeros(999, np.float32)}
    change(tensors)
    write_model(tmp_path / "models/odd", tensors)
    with pytest.raises(ValueError, match="model/h10/mlp/c_fc/b.*144"):
        load()


@pytest.fixture(scope="module")
def checked_model(tmp_path_factory):
    """A checked copy of the bundled model, and what loading it gives."""
    folder = tmp_path_factory.mktemp("checked")
    shutil.copytree(ROOT / "models/2M", folder / "2M", ignore=shutil.ignore_patterns("*.checked.json"))
    return folder, utils.load_encoder_hparams_and_params("2M", folder)


@pytest.mark.parametrize("name", [*FILES[:5], NOTE])
@settings(max_examples=60, deadline=None)
@given(
    where=st.floats(0, 1, exclude_max=True), byte=st.one_of(st.integers(0, 255), st.sampled_from(b'\n\r "0123456789'))
)
def test_one_byte_of_a_small_file_changed(checked_model, name, where, byte):
    """All is as before, or it is refused in one line. Another n_head that divides n_embd contradicts nothing."""
    folder, (encoder_, hparams, params) = checked_model
    path = folder / "2M" / name
    kept = path.read_bytes()
    try:
        change_byte(path, int(where * len(kept)), byte)
        try:
            loaded = utils.load_encoder_hparams_and_params("2M", folder)
        except (ValueError, OSError) as error:
            assert "\n" not in str(error) and str(error)
            return
        assert loaded[0].encoder == encoder_.encoder and loaded[0].bpe_ranks == encoder_.bpe_ranks
        assert {**loaded[1], "n_head": 4} == hparams
        assert_holds(loaded[2], flat(params), mapped=True)
    finally:
        path.write_bytes(kept)
