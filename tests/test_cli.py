"""The command line: what it takes, what it prints, what it refuses, how it ends, on a terminal and without."""

import inspect
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from unittest.mock import Mock, patch

import pytest
from conftest import GOLDEN, ROOT, run

import gpt2
import gpt2_pico
import utils

on_posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no bash and no /dev/full")
os.environ.pop("PYTHONUNBUFFERED", None)  # it would hide what is not flushed
signal.signal(signal.SIGINT, signal.default_int_handler)  # a child would inherit that it is ignored
SCRIPTS = {"gpt2.py": gpt2.cli, "gpt2_pico.py": gpt2_pico.main}
SMALL = ["--model_size", "2M"]
SHORT = [*SMALL, "-n", "3"]
both_scripts = pytest.mark.parametrize("script", SCRIPTS)


def texts_of(prompts, n_tokens_to_generate=3, **options):
    """What the command has to print for a prompt, or for each of a list."""
    return gpt2.main(prompts, n_tokens_to_generate, "2M", **options)


def typed(*args, script="gpt2.py"):
    """Run the command in this process: (its status or what it says at its end, stdout, stderr)."""
    argv = [script, *map(str, args)]
    with patch("sys.argv", argv), redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as told:
        try:
            status = utils.run(SCRIPTS[script])
        except SystemExit as end:
            status = end.code
    return status, out.getvalue(), told.getvalue()


def in_bash(end, *args):
    """Python with redirections or a pipe behind it, and its own returncode; an O is on standard input."""
    command = ["bash", "-c", f'ulimit -t 60; "$0" "$@" {end}; exit ${{PIPESTATUS[0]}}', sys.executable, *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", input="O", timeout=60, check=False)


# ---- What it takes and prints ----------------------------------------------------------------------------------------
AS_TYPED = ["hello, world", "123", "[1, 2]", "True", "", "{'a': 1}", " leading space", "-", "tab\there", "# no", "1e3"]
AS_TYPED += ["both ' and \"", "-5", "*", 'r"raw"', "__doc__", "back\\nslash", "two\nlines\n", "\u2028", "🙂👩‍👧‍👦"]
AFTER_PROMPT = ["--with dashes", "--help", "-h", "-hello", "--", "", "-", "'single'", "1,2", "a=b"]


@both_scripts
def test_a_prompt_is_taken_as_typed(script):
    """Alone, as the value of --prompt and after --."""
    runs = [[prompt] for prompt in AS_TYPED] + [[f"--prompt={prompt}"] for prompt in AFTER_PROMPT]
    runs += [*(["--", prompt] for prompt in AFTER_PROMPT), ["--prompt", "-", "--"]]
    printed = [typed(*SMALL, "-n", "9", *args, script=script) for args in runs]
    texts = texts_of([*AS_TYPED, *AFTER_PROMPT, *AFTER_PROMPT, "-"], 9)  # a prompt read otherwise has other 9 tokens
    assert printed == [(None, text + "\n", "") for text in texts]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_several_prompts_and_a_flag_that_counts_as_it_is_given_last(encoding):
    prompts = [*AS_TYPED, *AFTER_PROMPT, "one more"]
    args = [*AS_TYPED, "-n", "9", *SHORT, "--prompt=no", "--prompt", "one more", "--", *AFTER_PROMPT]
    expected = "".join(f"> {prompt}\n{text}\n" for prompt, text in zip(prompts, texts_of(prompts)))
    expected = expected.encode(encoding, "replace").decode()  # what the output cannot show is replaced
    result = run(*args, env={"PYTHONIOENCODING": encoding})
    assert (result.stdout, result.stderr, result.returncode) == (expected, "", 0)


TYPED = {  # (what is in the file or comes through the pipe, the prompts of the file)
    "from Windows": ("\ufeffO\r\n1,2\r\n", ["O", "1,2"]),
    "blank lines": ("O\n\n \nO\n\n", ["O", "", " ", "O", ""]),
    "one blank line": ("\n", [""]),
    "no line end": (" a\n é🙂\u2028\x0b \nb\rO", [" a", " é🙂\u2028\x0b ", "b\rO"]),
}


@pytest.mark.parametrize("text, prompts", TYPED.values(), ids=TYPED)
def test_text_from_a_file_or_a_pipe(tmp_path, text, prompts):
    """A file is a prompt a line; what is piped is one prompt."""
    (tmp_path / "prompts").write_bytes(text.encode())
    expected = [json.dumps({"prompt": prompt, "text": text}) for prompt, text in zip(prompts, texts_of(prompts))]
    for path in "~/prompts", "-":
        env = {"HOME": str(tmp_path), "USERPROFILE": str(tmp_path)}
        result = run(*SHORT, "--prompts_file", path, input=text, env=env)
        assert (result.returncode, result.stderr, result.stdout.splitlines()) == (0, "", expected)
    assert run(*SHORT, input=text).stdout == texts_of(re.sub(r"\A\ufeff|\r?\n\Z", "", text)) + "\n"


@on_posix
@pytest.mark.parametrize("way", ["<", "--prompts_file=", "--prompts_file=- <"], ids=["pipe", "file", "lines of a pipe"])
@pytest.mark.parametrize("source, told", [("/dev/null", "is empty"), ("/dev/zero", "error: ")])
def test_empty_input_is_an_error_and_so_is_a_line_without_end(source, told, way):
    result = in_bash(f"{way}{source}", "gpt2.py", *SMALL)
    assert result.returncode == 1 and told in result.stderr


BAD_LINES = {b"long " * 300: "256", b"caf\xe9": "UTF-8", b"\xff\xfeO": "UTF-8", b"a" * (2**21 + 1): "256"}


def test_a_bad_line_costs_its_own_line_only(tmp_path):
    """Its error tells which it was; the others get their texts whatever the batch, and the end tells how many."""
    lines = [b"Once", *BAD_LINES, b"", b"O", *BAD_LINES, b"Once"]
    (tmp_path / "prompts").write_bytes(b"\n".join(lines))
    args = [*SHORT, "--top_p=0.9", "--seed=3", "--prompts_file", tmp_path / "prompts"]
    (status, out, _), *others = [typed(*args, f"--batch_size={n}") for n in (1, 4)]
    assert others[0][:2] == (status, out) and out.count("\n") == len(lines) and re.match("error: .* 8 prompts", status)
    texts = texts_of(["" if line in BAD_LINES else line.decode() for line in lines], top_p=0.9, seed=3)
    for number, (line, text, answer) in enumerate(zip(lines, texts, map(json.loads, out.splitlines())), 1):
        assert answer.pop("prompt")[:99] == line.decode(errors="replace")[:99]
        assert answer == {"text": text} or re.search(rf"(?=.*\b{number}\b).*{BAD_LINES[line]}", answer["error"])


@pytest.mark.parametrize("args", ["--help", "a prompt --help", "--seed -h"])
def test_help(args):
    """It tells every flag and its meaning, what is fetched and the context length, in lines of 80 columns."""
    result = run(*args.split(), env={"COLUMNS": "80"})
    assert (result.returncode, result.stderr) == (0, "") and max(map(len, result.stdout.splitlines()[2:])) <= 80
    for flag in [*inspect.signature(gpt2.cli).parameters][1:]:
        assert re.search(rf"\n    (-\w, )?--{flag}=\w+\n( {{8}}(Type|Default): .*\n)+ {{8}}\w", result.stdout)
    assert re.search(r"(?s)(?=.*124M.{0,9}500 MB)(?=.*1,?024)(?=.*GPT2_MODELS_URL).* python gpt2.py ", result.stdout)


@pytest.mark.parametrize("command", ["gpt2_pico.py Once", "gpt2.py Once --top_p=1e-9", "gpt2.py --prompts_file=-"])
def test_w_error_is_silent(command):
    script, *args = command.split()
    result = run(*args, *SHORT, script=script, input="Once\n", env={"PYTHONWARNINGS": "error"})
    assert (result.returncode, result.stderr) == (0, "") and " upon a time" in result.stdout


def test_a_stdout_without_isatty(tmp_path, monkeypatch):
    """Such as an editor puts in its place: a file's texts, and the text of what is asked for."""
    (tmp_path / "prompts").write_text("Once\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("Once\n"))
    monkeypatch.setattr(os, "isatty", lambda number: number == 0)
    monkeypatch.setattr(sys, "stdout", stdout := Mock(spec=["write", "flush"]))
    for prompts_file in tmp_path / "prompts", None:
        gpt2.cli(prompts_file=prompts_file, n_tokens_to_generate=3, model_size="2M")
    assert "".join(call.args[0] for call in stdout.write.call_args_list).count(texts_of("Once")) == 2


# ---- What it refuses -------------------------------------------------------------------------------------------------
MISTYPED = {  # what is typed: what the line before the usage tells
    "--temprature 1": "--temprature.*--temperature", "--n_token_to_generate 5": "--n_tokens_to_generate",
    "--model 2M": "--model; .* or --model", "--sed=5": "--sed.*--seed", "--json": "--json; after", "-n5": "-n5",
}  # fmt: skip
REFUSED = {  # what is typed: what the one line tells
    "--n_tokens_to_generate=1.5": "n_tokens_to_generate.*'1.5'", "-n": "-n .*value", "--seed -b 5": "--seed .*value",
    "--temperature=nan": "temperature.*'nan'", "--prompts_file=-": "prompts_file", "--model_size=3M": "'3M'",
}  # fmt: skip


@both_scripts
@pytest.mark.parametrize("args", MISTYPED)
def test_a_mistyped_flag_is_named_with_the_nearest_before_the_usage(tmp_path, args, script):
    status, out, told = typed("It is True", "--models_dir", tmp_path / "new", *args.split(), script=script)
    assert (status, out, os.listdir(tmp_path)) == (2, "", []) and {script, "--model_size"} <= {*told.split()}
    wanted = MISTYPED[args] if script == "gpt2.py" else args.split()[0]  # gpt2_pico.py has fewer flags
    assert re.match(f"error: .*{wanted}", told) and not re.search("Traceback|\0|-- --help", told)


@pytest.mark.parametrize("args", REFUSED)
def test_what_makes_no_sense_is_refused_in_one_line(tmp_path, args):
    """Before anything is fetched."""
    status, *told = typed("It is True", "--models_dir", tmp_path / "two\nlines", *args.split())
    assert re.fullmatch(f"error: .*{REFUSED[args]}.*", status) and told == ["", ""] and os.listdir(tmp_path) == []


def test_a_bad_prompt_among_several_costs_its_own_text_only():
    status, out, told = typed(*SHORT, "Once", bad := "long " * 300, "O")
    one, three = texts_of(["Once", "O"])
    assert (status, out) == (1, f"> Once\n{one}\n> {bad}\n> O\n{three}\n")
    assert re.fullmatch("error: prompt 2: .*\n", told)


@both_scripts
@pytest.mark.parametrize("package", ["numpy", "regex", "fire", "requests"])
def test_a_package_that_is_missing_is_named(tmp_path, script, package):
    """requests is needed for a download alone."""
    (tmp_path / f"{package}.py").write_text(f"raise ModuleNotFoundError('No module named {package}')")
    args = ["--models_dir", tmp_path / "models"] if package == "requests" else SMALL
    result = run("Once", *args, script=script, env={"PYTHONPATH": str(tmp_path)})
    assert (result.returncode, result.stdout) == (1, "")
    assert re.fullmatch(f"(fetching .*\n)?error: .*{package}.*pip install.*{package}.*\n", result.stderr)


TEXT = GOLDEN[1]["text"] + "\n"
ENDS = {  # what stands behind the command: status, standard output, standard error
    "|head -c 9": ([0, 141], " upon a t", ""), ">/dev/full": ([1], "", "error: .* space .*\n"), "<&-": ([0], TEXT, ""),
    ">&-": ([0], "", ""), "2>&-": ([0], TEXT, ""), "<&- >&- 2>&-": ([0], "", ""), "--top_k=-1 2>&-": ([1, 2], "", ""),
}  # fmt: skip


@on_posix
@both_scripts
@pytest.mark.parametrize("end", ENDS)
def test_streams_that_are_closed_or_full_or_read_no_further(script, end):
    status, out, told = ENDS[end]
    result = in_bash(end, script, "Once", *SMALL)
    assert result.returncode in status and result.stdout == out and re.fullmatch(told, result.stderr)


@pytest.mark.filterwarnings("error")
def test_what_goes_wrong_inside_is_one_line_and_ctrl_c_in_a_notebook_an_exception(monkeypatch):
    """Which does not end what the command is run in, and leaves the tracebacks of later ones as they are."""
    before = sys.excepthook
    monkeypatch.setattr(gpt2, "gelu", lambda x: x / 0)
    assert re.fullmatch("error: .* weights\n", typed("Once", *SMALL)[2])
    monkeypatch.setattr(gpt2, "gpt2", Mock(side_effect=[MemoryError("no memory"), KeyError("é"), KeyboardInterrupt]))
    assert [typed("Once", *SMALL)[0] for _ in range(2)] == ["error: no memory", "error: 'é'"]
    with pytest.raises(KeyboardInterrupt):
        typed("Once", *SMALL)
    assert sys.excepthook is before


# ---- On a terminal ---------------------------------------------------------------------------------------------------
SLOWLY = """import gpt2, time, utils
plain = gpt2.gpt2
gpt2.gpt2 = lambda *args, **options: time.sleep(0.3) or plain(*args, **options)
utils.run(gpt2.cli)
"""


def terminal(*args, program=("gpt2.py",), before="", end=""):
    """The command, or another program, on a terminal, with what bash gets before it and behind it."""
    pytest.importorskip("fcntl", reason="Windows has no such terminals")
    pexpect = pytest.importorskip("pexpect")
    command = [f'exec {before} "$0" "$@" {end}', sys.executable, *program, *SMALL, *map(str, args)]
    options = {"cwd": str(ROOT), "encoding": "utf-8", "codec_errors": "surrogateescape", "timeout": 30}
    return pexpect.spawn("bash", ["-c", *command], env={**os.environ, "TERM": "dumb"}, **options)


def shown(process):
    """What a terminal shows until the next prompt is asked for."""
    process.expect_exact("\r\n> ")
    return process.before.replace("\r", "")


def rest_of(process):
    """(what it still shows, its exit status, the signal that ended it)."""
    rest = process.read()
    process.wait()
    return rest, process.exitstatus, process.signalstatus


def test_asks_again_and_again():
    pytest.importorskip("readline")
    asking = terminal()
    assert "Ctrl-D" in shown(asking)  # how to leave
    for line, prompt in {"The": "The", "": "", "Once": "Once", "\x1b[A": "Once"}.items():  # the last one is arrow up
        asking.sendline(line)
        assert shown(asking) == f"{prompt}\n{texts_of(prompt, 40)}"
    for prompt, told in ("long " * 300, "256"), ("caf\udcff", "UTF-8"):
        asking.sendline(prompt)
        assert re.search(f"error: (?!.*codec).*{told}", shown(asking))
    asking.sendeof()
    assert rest_of(asking)[1] == 0


@pytest.mark.parametrize("before", ["", "unshare --pid --fork"], ids=["alone", "the first process of a container"])
def test_the_text_comes_token_by_token_and_ctrl_c_ends_the_run_by_the_signal(before):
    if os.system(f"{before} true"):
        pytest.skip("no right to start such a process")
    running = terminal("Once", program=["-c", SLOWLY], before=before)
    running.expect_exact(texts_of("Once", 2))
    running.sendintr()
    rest, *how = rest_of(running)
    assert how == ([130, None] if before else [None, signal.SIGINT]) and len(rest) < 40


def test_ctrl_c_stops_a_text_or_drops_a_line_and_ctrl_d_while_a_text_runs_ends_after_it():
    asking = terminal("-n", 9, program=["-c", SLOWLY])
    shown(asking)
    asking.sendline("Once")
    asking.expect_exact(texts_of("Once", 2))
    asking.sendintr()
    assert len(shown(asking)) < 20
    asking.send("half a li")
    asking.expect_exact("half a li")
    time.sleep(0.3)  # readline can miss a signal in the moment in which it takes a letter
    asking.sendintr()
    shown(asking)
    asking.sendline("Once")
    asking.expect_exact(texts_of("Once", 2))
    asking.sendeof()
    rest, status, _ = rest_of(asking)
    assert status == 0 and texts_of("Once", 9) in texts_of("Once", 2) + re.sub(r"\^D|\x08", "", rest)


def test_a_random_seed_is_told_on_the_terminal_and_gives_the_texts_again(tmp_path):
    asking = terminal("--top_k=9", end=f">{tmp_path}/texts")
    asking.send("Once\nOnce\n\4")
    seed = re.search(r"seed\D(\d+)\r", asking.read())[1]
    texts = texts_of(["Once", "Once"], 40, batch_size=1, top_k=9, seed=seed)
    assert texts[0] != texts[1] and (tmp_path / "texts").read_text("utf-8") == "{}\n{}\n".format(*texts)


@pytest.mark.parametrize("end", ["", "| cat"], ids=["here", "elsewhere"])
def test_lines_are_answered_as_they_come_with_progress_if_they_go_elsewhere(end):
    typing = terminal("-n=3", "--prompts_file=-", "--batch_size=1", end=end)
    for prompt in "Once", "O":
        typing.sendline(prompt)
        typing.expect_exact(json.dumps({"prompt": prompt, "text": texts_of(prompt)}))
    typing.sendeof()
    assert ("2 prompts" in rest_of(typing)[0]) == bool(end)
