"""Other locales, checkouts and systems, and gpt2 as a library in programs of all kinds."""

import concurrent.futures
import multiprocessing
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import GOLDEN, ROOT, random_tensors, run, write_checkpoint

import gpt2

ONCE, TEXT = GOLDEN[1]["prompt"], GOLDEN[1]["text"]
KING = "Der König, „Héllo“"  # no character set of one byte has all of it
NO_UTF_8 = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}


def python(code, cwd=ROOT, **env):
    """What code prints in a process of its own, which finds the modules of this repository wherever it runs."""
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}"]
    result = subprocess.run(command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result
    return result.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="Windows hands arguments over as text")
def test_an_argument_arrives_in_the_c_locale():
    result = run(KING, "--model_size=2M", env=NO_UTF_8)
    assert (result.stdout, result.stderr) == (gpt2.main(KING, 40, "2M") + "\n", "")


def test_a_checkpoint_file_is_read_as_utf_8_in_the_c_locale(models):
    (models / "2M/checkpoint").write_text('model_checkpoint_path: "/josé/model.ckpt"', "utf-8")
    result = run(ONCE, "--model_size=2M", f"--models_dir={models}", env=NO_UTF_8)
    assert (result.stdout, result.stderr) == (TEXT + "\n", "")


def test_files_are_read_as_utf_8_in_a_latin_1_locale(tmp_path):
    subprocess.run(f"localedef -i en_US -f ISO-8859-1 {tmp_path}/en_US.ISO-8859-1", shell=True, timeout=60)
    env = {**NO_UTF_8, "LOCPATH": str(tmp_path), "LC_ALL": "en_US.ISO-8859-1"}
    if python("import locale; print(locale.getpreferredencoding())", **env) != "ISO-8859-1\n":
        pytest.skip("this system does not make or take the locale")
    (tmp_path / "prompts").write_text(KING, "utf-8")
    args = "--model_size=2M", f"--prompts_file={tmp_path}/prompts"
    assert run(*args, env=env).stdout == run(*args).stdout != ""


def test_a_checkout_with_windows_line_ends_runs(tmp_path):
    if not (shutil.which("git") and (ROOT / ".git").exists()):
        pytest.skip("no git, or no repository")
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-c", "core.autocrlf=true", ROOT, clone], timeout=120, check=True)
    assert b"\r\n" in (clone / "gpt2.py").read_bytes()
    assert (clone / "tests/golden-2M.json").read_bytes() == (ROOT / "tests/golden-2M.json").read_bytes()
    result = run(ONCE, "--model_size=2M", script=clone / "gpt2.py")
    assert (result.returncode, result.stdout, result.stderr) == (0, TEXT + "\n", "")


@pytest.mark.parametrize("name", ["utils.py", "encoder.py", "tensorflow.py", "requests.py"])
def test_it_runs_in_a_folder_of_someone_who_has_a(tmp_path, name):
    (tmp_path / name).write_text("raise SystemExit('the wrong one')")
    assert python(f"import gpt2; print(gpt2.main({ONCE!r}, 40, '2M'))", tmp_path) == TEXT + "\n"
    assert run(ONCE, "--model_size=2M", cwd=tmp_path).stdout == TEXT + "\n"


def test_a_tensorflow_that_fails_is_named_and_no_code_in_a_model_s_folder_runs(models, tmp_path):
    os.truncate(models / "2M/model.ckpt.data-00000-of-00001", 999)  # so that it takes TensorFlow
    (models / "2M/tensorflow.py").write_text("raise TypeError('the wrong one')")
    (tmp_path / "tensorflow.py").write_text("raise TypeError('the right one')")
    code = f"import gpt2\ntry: gpt2.main({ONCE!r}, 40, '2M', {str(models)!r})\nexcept ValueError as error: print(error)"
    assert re.search("TensorFlow .pip install.*the right one", python(code, models, PYTHONPATH=str(tmp_path)))


def test_threads_load_and_generate_side_by_side(models, model):
    hparams, place = {**model[1], "n_layer": 1}, lambda: (os.getcwd(), os.fstat(1).st_ino, os.fstat(2).st_ino)
    write_checkpoint(models / "2M", hparams, random_tensors(hparams), lambda names: sorted(names, reverse=True))
    before = place()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        others = [pool.submit(gpt2.main, ONCE, 5, "2M", models) for _ in range(3)]  # through TensorFlow
        texts = [pool.submit(gpt2.main, ONCE, 40, "2M") for _ in range(3)]
        assert {text.result(120) for text in texts} == {TEXT} and len({text.result(120) for text in others}) == 1
    assert place() == before


def test_what_is_printed_after_a_mistake_is_shown():
    code = "import gpt2, utils; sys.argv[1:] = ['Once', '--model_size=3M']\n"
    code += "try: utils.run(gpt2.cli)\nexcept SystemExit as error: print('then', error)"
    assert python(code).startswith("then error: ")


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_processes_of_a_program_that_has_used_it(method):
    code = f"import gpt2, multiprocessing as m; gpt2.main('', 1, '2M'); pool = m.get_context({method!r}).Pool(2); "
    code += f"print(pool.starmap_async(gpt2.main, [({ONCE!r}, 40, '2M')] * 2).get(60) == [{TEXT!r}] * 2); pool.close()"
    assert python(code) == "True\n"
