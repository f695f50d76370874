"""The command line: what it takes, what it prints, what it refuses, how it ends, on a terminal and without."""

import contextlib
import fcntl
import inspect
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
from select import select

import pytest
from conftest import GOLDEN, ROOT, error_of, run

import gpt2
import gpt2_pico
import utils
from encoder import Encoder

os.environ.pop("PYTHONUNBUFFERED", None)  # it would hide what is not flushed
SCRIPTS = {"gpt2.py": gpt2.cli, "gpt2_pico.py": gpt2_pico.main}
SMALL = ["--model_size", "2M"]
SHORT = [*SMALL, "-n", "3"]
AFTER_TEST = contextlib.ExitStack()
STEP_BY_STEP = """
import gpt2, os, sys, utils
plain, steps = gpt2.gpt2, int(sys.argv.pop())
gpt2.gpt2 = lambda *args, **options: os.read(steps, 1) and plain(*args, **options)
utils.run(gpt2.cli)
"""  # the command, each step of which waits until it may be taken


@pytest.fixture(autouse=True)
def around_test(monkeypatch):
    monkeypatch.setenv("GPT2_MODELS_URL", "http://127.0.0.1:1")  # nobody listens there
    yield
    AFTER_TEST.close()


def start(*args, code=None, around=(), **options):
    """The command, or a program in its place, as a process that runs on meanwhile; after the test it is killed."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a child would inherit that it is ignored
    command = [*around, sys.executable, *(["-c", code] if code else ["gpt2.py"]), *map(str, args)]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    options = {"encoding": "utf-8", "cwd": ROOT, "start_new_session": True, **pipes, **options}
    process = AFTER_TEST.enter_context(subprocess.Popen(command, **options))
    AFTER_TEST.callback(process.kill)
    return process


def finish(process):
    return *process.communicate(timeout=60), process.returncode


def in_bash(end, *args):
    """Python with redirections or a pipe behind it, and its own returncode; an O is on standard input."""
    command = ["bash", "-c", f'"$0" "$@" {end}; exit ${{PIPESTATUS[0]}}', sys.executable, *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", input="O", check=False)


def read_until(fd, done, wait=30):
    """What can be read from a file descriptor until done(text), or until nothing comes any more."""
    got = b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while not done(got.decode(errors="ignore")) and select([fd], [], [], wait)[0] and (byte := os.read(fd, 1)):
            got += byte
    return got.decode(errors="replace")


def pipe_of_steps():
    """The file descriptor at which STEP_BY_STEP waits, and a function that lets it take n steps."""
    reading, writing = os.pipe()
    return reading, lambda n: os.write(writing, b"." * n)


def texts_of(prompts, n_tokens_to_generate=3, **options):
    """What the command has to print for a prompt, or for each of a list."""
    return gpt2.main(prompts, n_tokens_to_generate, "2M", **options)


# ---- What it takes and prints ----------------------------------------------------------------------------------------

AS_TYPED = ["hello, world", "123", "[1, 2]", "True", "None", "", "{'a': 1}", " leading space", "-", "tab\there", "# no"]
AS_TYPED += ["'single'", '"double"', "both ' and \"", "1e3", "-5", "a=b", "()", "*", 'r"raw"', "1,2", "help", "__doc__"]
AS_TYPED += ["back\\nslash", "two\nlines\n", "\u2028", "...", "🙂👩‍👧‍👦"]
AFTER_PROMPT = ["--with dashes", "--help", "-h", "-hello", "--", "", "-", "'single'", "1,2", "a=b"]
BAD_LINES = {b"long " * 300: "256", b"caf\xe9": "UTF-8", b"\xff\xfeO": "UTF-8", b"a" * (2**21 + 1): "2.?097.?153"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_prompt_reaches_the_tokenizer_as_typed(script, monkeypatch, capsys):
    """Alone, as the value of --prompt and after --."""
    encoded, plain = [], Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda self, text: encoded.append(text) or plain(self, text))
    runs = [[prompt] for prompt in AS_TYPED] + [[f"--prompt={prompt}"] for prompt in AFTER_PROMPT]
    for args in [*runs, *(["--", prompt] for prompt in AFTER_PROMPT), ["--prompt", "-", "--"]]:
        monkeypatch.setattr(sys, "argv", [script, *SHORT, *args])
        utils.run(SCRIPTS[script])
    printed, prompts = capsys.readouterr().out, AS_TYPED + 2 * AFTER_PROMPT + ["-"]
    assert encoded == prompts
    assert printed == "".join(text + "\n" for text in texts_of(prompts))


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_several_prompts_and_a_flag_that_counts_as_it_is_given_last(encoding):
    prompts = [*AS_TYPED, *AFTER_PROMPT, "one more"]
    args = [*AS_TYPED, "-n", "9", *SHORT, "--prompt", "one more", "--", *AFTER_PROMPT]
    expected = "".join(f"> {prompt}\n{text}\n" for prompt, text in zip(prompts, texts_of(prompts)))
    result = run(*args, env={"PYTHONIOENCODING": encoding})
    expected = expected.encode(encoding, "replace").decode()  # what the output cannot show is replaced
    assert (result.stdout, result.stderr, result.returncode) == (expected, "", 0)


@pytest.mark.parametrize("typed", ["O\n-\n", "\ufeffO\r\n1,2\r\n", "O\n\n \nO\n\n", "", " a\n é🙂\u2028\x0b \nb\rO"])
def test_text_from_a_file_or_a_pipe(tmp_path, typed):
    """With a byte order mark, blank lines, no line end at the end. Piped text is one prompt, if there is no other."""
    (tmp_path / "prompts").write_bytes(typed.encode())
    prompts = re.split("\r?\n", re.sub(r"\r?\n\Z", "", typed.strip("\ufeff"))) if typed else []
    expected = [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts_of(prompts))]
    for path in "~/prompts", "-":
        result = run(*SHORT, "--prompts_file", path, input=typed, env={"HOME": str(tmp_path)})
        assert (result.returncode, result.stderr, result.stdout.isascii()) == (0, "", True)
        assert [json.loads(line) for line in result.stdout.split("\n")[:-1]] == expected
    assert run(*SHORT, input=typed).stdout == texts_of(re.sub(r"\A\ufeff|\r?\n\Z", "", typed)) + "\n"
    assert run(*SHORT, "--prompt=", input=typed).stdout == texts_of("") + "\n"


def test_with_batch_size_1_each_line_is_answered_before_the_next_is_there():
    process = start(*SHORT, "--prompts_file=-", "--batch_size=1", stdin=subprocess.PIPE)
    for prompt in "Once", "", "O":
        os.write(process.stdin.fileno(), f"{prompt}\n".encode())
        line = read_until(process.stdout.fileno(), lambda text: text.endswith("\n"))
        assert json.loads(line) == {"prompt": prompt, "text": texts_of(prompt)}
    assert finish(process) == ("", "", 0)


@pytest.mark.parametrize("options", [{}, {"seed": 0}, {"top_p": 0.9, "seed": 3}], ids=str)
def test_lines_do_not_depend_on_the_batch_nor_on_bad_lines(tmp_path, options):
    """A bad line gets an error with its number, the others get their texts, and the run ends with how many are bad."""
    good = [golden["prompt"].encode() for golden in GOLDEN] + [b"", b"Once"]
    lines = [*good[:3], *BAD_LINES, *good[3:], *BAD_LINES, b"Once"]
    (tmp_path / "prompts").write_bytes(b"\n".join(lines))
    flags = [*(f"--{name}={value}" for name, value in options.items()), "--prompts_file", tmp_path / "prompts"]
    results = [run(*SMALL, *flags, f"--batch_size={n}") for n in (1, 4, 32)]
    assert len({(result.returncode, result.stdout, result.stderr) for result in results}) == 1
    assert results[0].returncode == 1 and re.fullmatch(r"error: \D*\b8\b.*\n", results[0].stderr)
    texts = texts_of(["" if line in BAD_LINES else line.decode() for line in lines], 40, **options)
    assert (texts[-1] == texts[-6]) == (not options)  # sampled: one prompt twice, two texts
    answers = map(json.loads, results[0].stdout.splitlines())
    for number, (line, text, answer) in enumerate(zip(lines, texts, answers, strict=True), 1):
        assert answer.pop("prompt") == line.decode(errors="replace")
        assert answer == {"text": text} or line in BAD_LINES
        assert line not in BAD_LINES or re.search(rf"(?=.*\b{number}\b).*{BAD_LINES[line]}", answer["error"])


def test_utf_16_is_named(tmp_path):
    for data in b"\xff\xfeO\0n\0\n\0", b"\xfe\xff\0O\0n\0\n", b"O\0n\0\n\0", b"\0O\0n\0\n":
        (tmp_path / "prompts").write_bytes(data)
        for end in "--prompts_file ", "<":
            assert "UTF-16" in error_of(in_bash(f"{end}{tmp_path}/prompts", "gpt2.py", *SHORT))


@pytest.mark.parametrize("args", ["--help", "a prompt --help", "-h", "--seed -h"])
def test_help(args):
    """It tells every flag and its meaning, what is fetched, the context length, and whole words in 80 columns."""
    result = run(*args.split(), env={"COLUMNS": "80"})
    assert (result.returncode, result.stderr) == (0, "") and max(map(len, result.stdout.splitlines())) <= 80
    for flag in [*inspect.signature(gpt2.cli).parameters][1:]:
        assert re.search(rf"\n    (-\w, )?--{flag}=\w+\n( {{8}}(Type|Default): .*\n)+ {{8}}\w", result.stdout)
    words = {word for word in inspect.getdoc(gpt2.cli).split() if not word.endswith(":")}
    assert words <= {*result.stdout.split()} and "GPT2_MODELS_URL" in result.stdout
    assert re.search(r"(?s)(?=.*124M.{0,9}500 MB)(?=.*1,?024)(.* python gpt2.py ){2}", result.stdout)


def test_characters_of_several_tokens_whole_and_broken(model):
    ids = gpt2.generate(model[0].encode("Once"), model[2], 4, 100, temperature=1e9, seed=2)
    text = texts_of("Once", 100, temperature=1e9, seed=2)
    assert text == model[0].decode(ids) != "".join(model[0].decode([id]) for id in ids)


# ---- What it refuses -------------------------------------------------------------------------------------------------

MISTYPED = ["--n_token_to_generate 5", "--sed=5", "--json", "-x", "-t 0.8", "-hello", "-n5", "--temp 1", "--model 2M"]
IN_2M = "--model_size=2M --models_dir=models"
REFUSED = {  # what is typed: what the line must tell
    "--n_tokens_to_generate=1.5": "n_tokens_to_generate.*'1.5'", "--model_size": "model_size.*value", "-n --": "value",
    "--prompt -n 5": "prompt.*value", "-prompt --model_size 3M": "prompt.*value", "--prompt=a --prompt b": "--prompt",
    "--model_size=3M": "'3M'", "--model_size=": "''", "--model_size=..": "'..'", "--seed": "seed.*value",
    "--temperature=nan": "temperature.*'nan'", "--top_k=-1": "top_k.*'-1'", "--top_p=90": "top_p.*'90'",
    "--batch_size=0": "batch_size.*'0'", "--prompts_file=/none": "/none", "--prompts_file=- --prompt=a": "prompts_file",
    f"{IN_2M} -n 256": "256", f"{IN_2M} --prompt=\udcff": "UTF-8", "-n 1024": "1023",
}  # fmt: skip
FAULTS = {  # what is done before the command runs: what the line must tell
    **{f"sys.modules['{x}'] = None": f"{x}.*pip install.*{x}" for x in ("numpy", "regex", "fire", "requests")},
    "import numpy; numpy.tanh = lambda x: bytes(2**62)": "Memory",
    "import numpy; numpy.tanh = lambda x: x * numpy.inf": "weights",
}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("args", [*MISTYPED, *REFUSED])
def test_what_is_refused(tmp_path, script, args):
    """Before anything is fetched: a mistyped flag with the flags there are, all else in a line that names it."""
    prompt = [] if "prompt" in args else ["It is True"]
    result = run(*prompt, "--models_dir", tmp_path / "two\nlines", *args.split(), script=script)
    if args in MISTYPED or ("pico" in script and re.match("--([bst]|prompts)", args)):  # -t may be three flags
        assert (result.returncode, result.stdout) == (2, "") and {script, "--model_size"} <= {*result.stderr.split()}
        assert not re.search("Traceback|\0|-- --help", result.stderr)
    else:
        assert re.search(REFUSED[args], error_of(result))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("fault", FAULTS, ids=FAULTS.values())
def test_what_is_not_there_is_one_line(tmp_path, script, fault):
    """A package (one that is needed for a download alone), the memory, weights that are numbers."""
    code = f"import runpy, sys; del sys.argv[0]; {fault}; runpy.run_path(sys.argv[0], run_name='__main__')"
    args = ["--models_dir", tmp_path] if "requests" in fault else SMALL
    assert re.search(FAULTS[fault], error_of(in_bash("", "-c", code, script, "Once", *args)))


# ---- How it ends -----------------------------------------------------------------------------------------------------


def test_nobody_takes_the_text():
    """A reader that has enough is no error (but may be SIGPIPE, 141), a full disk is one."""
    for args in ["gpt2.py", "Once"], ["gpt2.py", "", "Once"], ["gpt2_pico.py", "Once"], ["gpt2.py", "--help"]:
        for end, n, ok, err in ("|head -c 9", 9, [0, 141], ""), (">/dev/full", 0, [1], "error:.* space .*\n"):
            result = in_bash(end, *args, *SMALL, "-n", 99)
            assert result.returncode in ok and len(result.stdout) == n and re.fullmatch(err, result.stderr)


@pytest.mark.parametrize("change", ["", "<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams(models, change):
    """Empty input, or one line, or the text alone; nothing meant for standard error is on standard output."""
    no_input, no_output, no_error = (re.search(rf"(^| ){stream}", change) for stream in ("<&-", ">&-", "2>&-"))
    texts = [re.escape(texts_of(prompt, 40)) + "\n" for prompt in ("Once", "" if no_input else "O")]
    for *args, status, out, err in (
        *((script, "Once", *SMALL, 0, texts[0], "") for script in SCRIPTS), ("gpt2.py", *SMALL, 0, texts[1], ""),
        ("gpt2.py", "Once", *SMALL, "--models_dir", models, 0, texts[0], "checking .*\n"),  # a first run
        ("gpt2.py", "--help", 0, "(?s)NAME.*", ""), ("gpt2_pico.py", *"abcd-", 2, "", "[^\0]*arg: -\n[^\0]*"),
        ("gpt2.py", "--top_k=-1", 1, "", "error: .*\n"),
    ):  # fmt: skip
        result = in_bash(change, *args)
        assert result.returncode == status and re.fullmatch("" if no_output else out, result.stdout)
        assert re.fullmatch("" if no_error else err, result.stderr)


@pytest.mark.parametrize("around", [[], ["bash", "-c", 'for i in 1 2 3; do "$@"; done', "bash"]], ids=["", "loop"])
def test_the_text_comes_token_by_token_and_ctrl_c_ends_the_run_by_the_signal(model, around):
    """Through a pipe, too; the process ends by SIGINT itself, so a shell loop around it ends as well."""
    waiting, take = pipe_of_steps()
    process = start("Once", *SMALL, waiting, code=STEP_BY_STEP, around=around, pass_fds=[waiting])
    for id in GOLDEN[1]["greedy"][:9]:
        take(1)
        token = model[0].decode([id])
        assert read_until(process.stdout.fileno(), lambda text, token=token: text == token) == token
        assert not select([process.stdout], [], [], 0)[0]
    os.killpg(process.pid, signal.SIGINT)
    take(99)  # for those that would go on
    assert finish(process) == ("", "", -signal.SIGINT)


# ---- On a terminal ---------------------------------------------------------------------------------------------------


def shown(text):
    """What a terminal shows, without what steers it."""
    return re.sub(r"\x1b\[[?\d;]*[a-zA-Z]|\^C|\r", "", text)


class Terminal:
    """The command on a pseudo-terminal, when it has asked for the first time, unless first is empty."""

    def __init__(self, *args, first="\n> ", **options):
        self.fd, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, bytes([24, 0, 80, 0, 0, 0, 0, 0]))
        streams = {"stdin": slave, "stdout": slave, "stderr": slave, "env": {**os.environ, "TERM": "vt100"}}
        streams["preexec_fn"] = lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        AFTER_TEST.callback(os.close, self.fd)
        self.process = start(*SMALL, *args, **{**streams, **options})
        os.close(slave)
        assert not first or "Ctrl-D" in self.expect(first)  # how to leave

    def type(self, text):
        os.write(self.fd, text.encode(errors="surrogateescape"))

    def expect(self, wanted):
        """Read on until `wanted`: what is shown before it."""
        text = shown(read_until(self.fd, lambda text: wanted in shown(text)))
        assert wanted in text
        return text.split(wanted)[0]

    def answer(self, prompt):
        self.type(prompt + "\n")
        return self.expect("\n> ")

    def end(self):
        """(what is shown until the process ends, its standard output if that is a pipe, returncode)."""
        out, _, returncode = finish(self.process)
        return shown(read_until(self.fd, lambda text: False)), out, returncode


def test_asks_again_and_again_with_the_model_loaded_once_until_ctrl_d(tmp_path):
    (tmp_path / "models").symlink_to(ROOT / "models")
    terminal = Terminal("--models_dir", tmp_path / "models")
    (tmp_path / "models").unlink()
    for prompt in GOLDEN[0]["prompt"], "Once", "":
        assert terminal.answer(prompt) == prompt + "\n" + texts_of(prompt, 40)
    assert terminal.answer("\x1b[A") == "Once\n" + texts_of("Once", 40)  # arrow up
    assert re.search("error: .*256", terminal.answer("long " * 300))
    assert re.search("error: (?!.*codec).*UTF-8", terminal.answer("caf\udcff"))
    terminal.type("\x04")
    assert terminal.end()[2] == 0


def test_ctrl_c_stops_a_text_or_drops_a_line_and_asks_again():
    waiting, take = pipe_of_steps()
    terminal = Terminal(waiting, code=STEP_BY_STEP, pass_fds=[waiting])
    terminal.type("Once\n")
    take(3)
    terminal.expect(texts_of("Once"))
    terminal.type("\x03")
    assert terminal.expect("\n> ") == ""
    terminal.type("half a li")
    terminal.expect("half a li")
    for _ in range(9):  # readline can miss one, in the moment in which it takes a letter
        terminal.type("\x03")
        if "> " in read_until(terminal.fd, lambda text: "\n> " in shown(text), wait=1):
            break
    terminal.type("O\n")
    take(40)
    terminal.expect("O\n" + texts_of("O", 40) + "\n> ")


def test_a_random_seed_is_told():
    """On the terminal, while text alone goes to a file; with it the texts can be had again. 0 is a seed."""
    terminal = Terminal("--top_k=9", first="", stdout=subprocess.PIPE)
    terminal.type("Once\nOnce\n\x04")
    told, out, returncode = terminal.end()
    one, another = texts_of(["Once", "Once"], 40, batch_size=1, top_k=9, seed=re.search(r"seed\D(\d+)\n", told)[1])
    assert one != another and (out, returncode) == (f"{one}\n{another}\n", 0)
    assert run("Once", *SHORT, "--top_k=9").stderr == ""  # no terminal
    terminal = Terminal("Once", "-n=3", "--seed=0", first="", stdout=subprocess.PIPE)
    assert terminal.end() == ("", texts_of("Once", seed=0) + "\n", 0)


def test_progress_is_shown_on_a_terminal_if_the_texts_go_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("TQDM_MININTERVAL", "0")
    (tmp_path / "prompts").write_text("Once\n" * 3)
    args, lines = ("-n=3", "--prompts_file", tmp_path / "prompts"), 3 * '{"prompt": "Once", "text": " upon a time"}\n'
    told, out, returncode = Terminal(*args, first="", stdout=subprocess.PIPE).end()
    assert ("0/3" in told, "3/3" in told, out, returncode) == (True, True, lines, 0)
    assert Terminal(*args, first="").end()[0] == lines


SESSION = """
import fire, gc, signal
state = lambda: (signal.getsignal(signal.SIGINT), gc.get_freeze_count(), fire.parser.DefaultParseValue)
before = state()
%run gpt2.py Once --model_size 2M -n 3
%run gpt2_pico.py Once --model_size 2M -n 3
%run gpt2.py Once --model_sise 2M
%run gpt2.py Once --model_size 2M --top_k=-1
%run gpt2.py --help
print("as before:", state() == before)
"""
SHELLS = {"IPython": "IPython as x; x.start_ipython", "ipykernel": "jupyter_client.runapp as x; x.main"}


@pytest.mark.parametrize("package", SHELLS)
def test_in_ipython_or_a_notebook(tmp_path, package, monkeypatch):
    """Texts and mistakes are shown, later output too, and the session is as it was before."""
    pytest.importorskip(package)
    for name, value in ("HOME", tmp_path), ("IPYTHONDIR", tmp_path), ("PAGER", "cat"):
        monkeypatch.setenv(name, str(value))
    (tmp_path / "session.ipy").write_text(SESSION)
    text, _, _ = Terminal(code=f"import {SHELLS[package]}(['{tmp_path}/session.ipy'])", first="").end()
    assert text.count(" upon a time\n") == 2 and "as before: True\n" in text
    assert re.search("(?s)(?=.*--model_sise)(?=.*top_k.*'-1')(?=.*GPT2_MODELS_URL)", text)
