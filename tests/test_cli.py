"""The command line, as a process of its own: what it takes, what it prints, what it refuses, how it ends."""

import ast
import contextlib
import fcntl
import inspect
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios

import pytest
from conftest import GOLDEN, ROOT, error_of, run

import gpt2

os.environ.pop("PYTHONUNBUFFERED", None)  # it would hide what is not flushed
SCRIPTS = ["gpt2.py", "gpt2_pico.py"]
SMALL = ["--model_size", "2M"]
SHORT = [*SMALL, "-n", "3"]
FLAGS = [p for p in inspect.signature(gpt2.cli).parameters.values() if p.kind is not p.VAR_POSITIONAL]
NOWHERE = {"GPT2_MODELS_URL": "http://127.0.0.1:1"}  # nobody listens there

# Programs that run the command with one thing changed.
SHOW_ENCODED = """
import encoder, runpy, sys
plain = encoder.Encoder.encode
def encode(self, text):
    print(ascii(text), file=sys.stderr)
    return plain(self, text)
encoder.Encoder.encode = encode
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
STEP_BY_STEP = """
import gpt2, os, utils
plain = gpt2.gpt2
def gpt2_step(*args, **kwargs):
    os.read(int(os.environ["STEPS"]), 1)
    return plain(*args, **kwargs)
gpt2.gpt2 = gpt2_step
utils.run(gpt2.cli)
"""
WITHOUT = """
import runpy, sys
sys.modules[sys.argv[1]] = None
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def start(*args, code=None, **options):
    """The command, or a program in its place, as a process that runs on meanwhile."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a child would inherit that it is ignored
    command = [sys.executable, *(["-c", code] if code else ["gpt2.py"]), *args]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, encoding="utf-8", cwd=ROOT, **{**pipes, **options})


def finish(process):
    """(returncode, stdout, stderr) of a process that ends by itself."""
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, out, err


def read_until(fd, done, seconds=30):
    """What can be read from a file descriptor until done(text), or until nothing comes any more."""
    text = b""
    while not done(text.decode("utf-8", "ignore")) and select.select([fd], [], [], seconds)[0]:
        try:
            chunk = os.read(fd, 1)
        except OSError:  # the other end of a terminal is closed
            break
        if not chunk:
            break
        text += chunk
    return text.decode("utf-8")


def texts_of(prompts, **options):
    """What the command has to print for prompts."""
    return gpt2.main(prompts, **{"model_size": "2M", "n_tokens_to_generate": 3, **options})


def json_lines(result):
    assert (result.returncode, result.stderr) == (0, "")
    return [json.loads(line) for line in result.stdout.split("\n")[:-1]]


# ---- What it takes and prints ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("golden", GOLDEN[1::4], ids=lambda golden: golden["prompt"][:9])
def test_golden_text_and_nothing_else(script, golden):
    result = run(golden["prompt"], *SMALL, script=script)
    assert (result.returncode, result.stdout, result.stderr) == (0, golden["text"] + "\n", "")


AS_TYPED = ["hello, world", "123", "[1, 2]", "True", "None", "", "{'a': 1}", " leading space", "-", "tab\there", "# no"]
AS_TYPED += ["'single'", '"double"', "both ' and \"", "🙂👩‍👧‍👦", "1e3", "-5", "a=b", "()", "*", 'r"raw"', "back\\nslash"]  # fmt: skip
AS_TYPED += ["two\nlines\n", "\u2028", "help", "...", "__doc__"]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("prompt", ["1,2", "", "-", "'quoted'", "--starts with dashes", "-h", "True"])
def test_a_prompt_reaches_the_tokenizer_as_typed(script, prompt):
    """Alone, and after --prompt=."""
    for arg in [f"--prompt={prompt}"] + [prompt] * (prompt[:2] not in ("--", "-h")):
        returncode, out, err = finish(start(script, arg, *SMALL, "--n_tokens_to_generate=3", code=SHOW_ENCODED))
        assert (returncode, [ast.literal_eval(line) for line in err.splitlines()]) == (0, [prompt])
        assert out == texts_of(prompt) + "\n"


def test_several_prompts_as_typed():
    expected = "".join(f"> {prompt}\n{text}\n" for prompt, text in zip(AS_TYPED, texts_of(AS_TYPED)))
    assert run(*AS_TYPED, *SHORT).stdout == expected


def test_a_repeated_flag_counts_as_it_is_given_last():
    assert run("Once", "-n", "9", *SHORT).stdout == texts_of("Once") + "\n"


FILES = [
    (b"Once\nO\n", ["Once", "O"]),
    (b"Once\nO", ["Once", "O"]),
    (b"\xef\xbb\xbfOnce\r\nO\r\n", ["Once", "O"]),  # a byte order mark
    (b"Once\n\n \nO\n\n", ["Once", "", " ", "O", ""]),
    (b"\n", [""]),
    (b"", []),
    ("hello, world\n-\n  é🙂\u2028\x0b \n".encode(), ["hello, world", "-", "  é🙂\u2028\x0b "]),
]


@pytest.mark.parametrize(("content", "prompts"), FILES)
def test_prompts_file(tmp_path, content, prompts):
    (tmp_path / "prompts").write_bytes(content)
    expected = [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts_of(prompts))]
    assert json_lines(run(*SHORT, "--prompts_file", tmp_path / "prompts")) == expected
    assert json_lines(run(*SHORT, "--prompts_file", "-", input=content.decode())) == expected


def test_line_by_line():
    """With --batch_size 1 a program can talk to it: each line is answered before the next is there."""
    process = start(*SHORT, "--prompts_file=-", "--batch_size=1", stdin=subprocess.PIPE)
    try:
        for prompt in "Once", "", "O":
            process.stdin.write(prompt + "\n")
            process.stdin.flush()
            line = read_until(process.stdout.fileno(), lambda text: text.endswith("\n"))
            assert json.loads(line) == {"prompt": prompt, "text": texts_of(prompt)}
    finally:
        assert finish(process)[0] == 0


@pytest.mark.parametrize(("bad", "words"), [(b"long " * 300, ["256"]), (b"caf\xe9", ["UTF-8"])])
def test_a_bad_line_is_named_and_what_was_done_before_is_out(tmp_path, bad, words):
    (tmp_path / "prompts").write_bytes(b"Once\nO\nO\n" + bad + b"\nOnce\n")
    result = run(*SHORT, "--prompts_file", tmp_path / "prompts", "--batch_size", "2")
    assert [json.loads(line)["prompt"] for line in result.stdout.splitlines()] == ["Once", "O"]
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1
    assert re.match(r"error: .*\b4\b", result.stderr) and all(word in result.stderr for word in words)


@pytest.mark.parametrize("options", [{}, {"seed": 3}, {"top_p": 0.9, "seed": 3}], ids=str)
def test_results_do_not_depend_on_the_batch(options):
    prompts, flags = [golden["prompt"] for golden in GOLDEN] + ["", "Once", "Once"], [*SMALL, "--prompts_file=-"]
    flags += [f"--{name}={value}" for name, value in options.items()]
    runs = [json_lines(run(*flags, f"--batch_size={n}", input="\n".join(prompts))) for n in (1, 4, 32)]
    assert [line["prompt"] for line in runs[0]] == prompts
    assert runs[0] == runs[1] == runs[2]
    assert (runs[0][-1]["text"] == runs[0][-2]["text"]) == (not options)  # sampled: one prompt twice, two texts


@pytest.mark.parametrize("typed", ["Once upon", "Once\n", "Once\r\n", "a\r\nb\rc\n", " a\n\n- b \n\n", ""])
def test_standard_input_is_one_prompt(typed):
    assert run(*SHORT, input=typed).stdout == texts_of(re.sub(r"\r?\n\Z", "", typed)) + "\n"


@pytest.mark.parametrize("args", [["--help"], ["a prompt", "--help"], ["-h"]], ids=" ".join)
def test_help_tells_every_flag_its_meaning_and_its_default(args):
    result = run(*args, env=NOWHERE)
    assert result.returncode == 0
    blocks = re.split(r"\n    (?=-)", result.stdout + result.stderr)
    for flag in FLAGS:
        [block] = [block for block in blocks if re.match(rf"(-\w, )?--{flag.name}=", block)]
        assert f"Default: {flag.default!r}" in block
        assert not re.match("Type:|Default:", block.rstrip().split("\n")[-1].strip())


# ---- What it refuses ------------------------------------------------------------------------------------------------

MISTYPED = ["--n_token_to_generate 5 hi", "hi --sed=5", "hi --jsn", "hi -x", "hi -t 0.8", "-hello", "hi --", "hi -n5"]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("args", MISTYPED)
def test_a_mistyped_flag_is_refused_at_once(tmp_path, script, args):
    """Before 124M would be downloaded; -t may be temperature, top_k or top_p."""
    result = run(*args.split(), "--models_dir", tmp_path / "models", env=NOWHERE, script=script)
    assert (result.returncode, result.stdout, os.listdir(tmp_path)) == (2, "", [])
    assert "Usage: " in result.stderr and "Traceback" not in result.stderr


BAD = [("n_tokens_to_generate", value) for value in ("0", "-1", "1.5", "many", "", "inf")]
BAD += [("temperature", "-1"), ("temperature", "nan"), ("top_k", "1.5"), ("top_p", "0"), ("top_p", "90")]
BAD += [("seed", "-1"), ("seed", None), ("batch_size", "0")]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_value_is_one_line(tmp_path, name, value):
    """It names the flag and what was typed, before anything is fetched."""
    flag = f"--{name}" if value is None else f"--{name}={value}"
    line = error_of(run("hi", "--models_dir", tmp_path / "models", flag, env=NOWHERE))
    assert name in line and repr("True" if value is None else value) in line
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_makes_no_sense_is_one_line(tmp_path, script):
    assert "'x'" in error_of(run("hi", "--n_tokens_to_generate=x", env=NOWHERE, script=script))
    for n, ends_well in (251, True), (252, False):  # 5 + 251 tokens = 256
        result = run("Once upon a time", *SMALL, f"--n_tokens_to_generate={n}", script=script)
        assert result.returncode == (not ends_well) and ("256" in result.stderr) == (not ends_well)
    error_of(run(os.fsdecode(b"bad \xff byte"), *SMALL, script=script))
    for name in "..", "", "2M/":
        assert repr(name) in error_of(run("hi", f"--model_size={name}", script=script))
    assert str(tmp_path) in error_of(run(*SMALL, "--prompts_file", tmp_path))


@pytest.mark.parametrize("package", ["regex", "fire", "tensorflow.python"])
def test_a_missing_package_is_one_line(package):
    returncode, out, err = finish(start(package, "gpt2.py", "Once", *SHORT, code=WITHOUT))
    if package == "tensorflow.python":  # it is not missed once the model is checked
        assert (returncode, out) == (0, texts_of("Once") + "\n")
    else:
        assert (returncode, out, len(err.splitlines())) == (1, "", 1)
        assert err.startswith("error: ") and package in err and "pip install" in err


# ---- How it ends -----------------------------------------------------------------------------------------------------


def test_head_gets_what_it_wants():
    command = f'"{sys.executable}" gpt2.py Once --model_size 2M --n_tokens_to_generate 200 | head -c 10'
    result = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == (GOLDEN[1]["text"][:10], "")


@pytest.mark.parametrize("prompts", [["Once"], ["Once", "O"]], ids=len)
def test_a_full_disk_is_an_error(prompts):
    with open("/dev/full", "w") as full:
        returncode, _, err = finish(start(*prompts, *SMALL, stdout=full))
    assert (returncode, len(err.splitlines())) == (1, 1)
    assert err.startswith("error: ") and "No space left" in err


def test_the_text_comes_token_by_token_and_ctrl_c_ends_the_run_by_the_signal(model):
    """Through a pipe, too; the process ends by SIGINT itself, so a shell loop around it ends as well."""
    steps, step = os.pipe()
    env = {**os.environ, "STEPS": str(steps)}
    process = start("Once", *SMALL, code=STEP_BY_STEP, pass_fds=[steps], env=env)
    try:
        for id in GOLDEN[1]["greedy"][:10]:
            os.write(step, b".")
            token = model[0].decode([id])
            assert read_until(process.stdout.fileno(), lambda text, token=token: text == token) == token
            assert not select.select([process.stdout], [], [], 0)[0]
        process.send_signal(signal.SIGINT)
        assert finish(process) == (-signal.SIGINT, "", "")
    finally:
        os.close(steps)
        os.close(step)


@pytest.mark.parametrize("env", [{"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "", "LC_ALL": "C"}], ids=str)
def test_where_the_output_is_ascii(env):
    assert json.loads(run(*SHORT, "--prompts_file=-", input="é", env=env).stdout)["prompt"] == "é"
    assert run("Once", *SMALL, env=env).stdout == GOLDEN[1]["text"] + "\n"


# ---- Interactive mode ------------------------------------------------------------------------------------------------


def shown(text):
    """What a terminal shows, without what steers it."""
    return re.sub(r"\x1b\[[?\d;]*[a-zA-Z]|\^C|\r", "", text)


class Terminal:
    """The command on a pseudo-terminal."""

    def __init__(self, *args):
        self.fd, slave = pty.openpty()
        streams = {"stdin": slave, "stdout": slave, "stderr": slave, "start_new_session": True}
        control = {"preexec_fn": lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0), "env": {**os.environ, "TERM": "vt100"}}
        self.process = start(*args, **streams, **control)
        os.close(slave)

    def type(self, text):
        os.write(self.fd, text.encode())

    def expect(self, wanted):
        """Read on until `wanted`: what is shown before it."""
        text = shown(read_until(self.fd, lambda text: wanted in shown(text)))
        assert wanted in text
        return text.split(wanted)[0]


@pytest.fixture
def terminal():
    with contextlib.ExitStack() as stack:

        def open_terminal(*args):
            terminal = Terminal(*SMALL, *args)
            for step in (lambda: os.close(terminal.fd), terminal.process.wait, terminal.process.kill):
                stack.callback(step)
            assert "Ctrl-D" in terminal.expect("> ")  # how to leave
            return terminal

        yield open_terminal


def test_asks_again_and_again_until_ctrl_d(terminal):
    terminal = terminal()
    for prompt, text in [*[(golden["prompt"], golden["text"]) for golden in GOLDEN[:3]], ("", gpt2.main("", 40, "2M"))]:
        terminal.type(prompt + "\n")
        assert terminal.expect("\n> ") == prompt + "\n" + text
    terminal.type("long " * 300 + "\n")
    assert "256" in terminal.expect("\n> ").split("error: ")[1]
    terminal.type("\x04")
    assert terminal.process.wait(30) == 0


def test_ctrl_c_stops_a_text_or_drops_a_line_and_asks_again(terminal):
    terminal = terminal("--n_tokens_to_generate=250")
    terminal.type("Once\n")
    terminal.expect("there lived")
    terminal.type("\x03")
    terminal.expect("\n> ")
    terminal.type("half a li")
    terminal.expect("half a li")
    dropped = ""
    while "\n> " not in dropped:  # readline can miss one, in the moment in which it takes a letter
        terminal.type("\x03")
        dropped += shown(read_until(terminal.fd, lambda text: "\n> " in shown(text), seconds=1))
    terminal.type("O\n")
    assert terminal.expect("f course").endswith("O\n")  # and not "half a liO"


def test_line_editing_and_history(terminal):
    pytest.importorskip("readline")
    terminal = terminal()
    terminal.type("Oncf\x7fe\n")  # a slip, mended with backspace
    terminal.expect(GOLDEN[1]["text"] + "\n> ")
    terminal.type("\x1b[A\n")  # arrow up
    assert terminal.expect(GOLDEN[1]["text"] + "\n> ").startswith("Once\n")


def test_sampling_goes_on(terminal):
    """With a seed, the same prompt gives another text the second time, and the same two again in another session."""
    sessions = []
    for _ in range(2):
        session = terminal("--seed=1")
        session.type("Once\n")
        first = session.expect("\n> ")
        session.type("Once\n")
        sessions.append((first, session.expect("\n> ")))
    assert sessions[0] == sessions[1] and sessions[0][0] != sessions[0][1]
