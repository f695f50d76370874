"""The command line, as a process of its own: what it takes, what it prints, what it refuses, how it ends."""

import contextlib
import fcntl
import inspect
import json
import os
import pty
import re
import select
import shlex
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
NOWHERE = {"GPT2_MODELS_URL": "http://127.0.0.1:1"}  # nobody listens there

# Programs around the command. One shows each prompt as the tokenizer gets it, for several runs one after the other; in
# another each step waits until it may be taken; the last does something before the command runs.
SHOW_ENCODED = """
import encoder, json, runpy, sys
script, *runs = sys.argv[1:]
plain = encoder.Encoder.encode
encoder.Encoder.encode = lambda self, text: print(json.dumps(text), file=sys.stderr) or plain(self, text)
for args in runs:
    sys.argv = [script, *json.loads(args)]
    runpy.run_path(script, run_name="__main__")
"""
STEP_BY_STEP = """
import gpt2, os, sys, utils
plain, steps = gpt2.gpt2, int(sys.argv.pop())
gpt2.gpt2 = lambda *args, **options: os.read(steps, 1) and plain(*args, **options)
utils.run(gpt2.cli)
"""
BEFORE = """
import runpy, sys
del sys.argv[0]
{}
runpy.run_path(sys.argv[0], run_name="__main__")
"""
AFTER_TEST = contextlib.ExitStack()


@pytest.fixture(autouse=True)
def nothing_is_left():
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
    """(stdout, stderr, returncode) of a process that ends by itself."""
    return *process.communicate(timeout=60), process.returncode


def read_until(fd, done, wait=30):
    """What can be read from a file descriptor until done(text), or until nothing comes any more."""
    text = b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while not done(text.decode(errors="ignore")) and select.select([fd], [], [], wait)[0]:
            byte = os.read(fd, 1)
            if not byte:
                break
            text += byte
    return text.decode(errors="replace")


def pipe_of_steps():
    """The file descriptor at which STEP_BY_STEP waits, and a function that lets it take n steps."""
    for fd in (pipe := os.pipe()):
        AFTER_TEST.callback(os.close, fd)
    return pipe[0], lambda n: os.write(pipe[1], b"." * n)


def texts_of(prompts, **options):
    """What the command has to print for a prompt, or for each of a list."""
    return gpt2.main(prompts, **{"model_size": "2M", "n_tokens_to_generate": 3, **options})


def json_lines(result):
    assert (result.returncode, result.stderr, result.stdout.isascii()) == (0, "", True)
    return [json.loads(line) for line in result.stdout.split("\n")[:-1]]


# ---- What it takes and prints ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_golden_text_and_nothing_else(script):
    for golden in GOLDEN[1], GOLDEN[5]:
        result = run(golden["prompt"], *SMALL, script=script)
        assert (result.returncode, result.stdout, result.stderr) == (0, golden["text"] + "\n", "")


AS_TYPED = ["hello, world", "123", "[1, 2]", "True", "None", "", "{'a': 1}", " leading space", "-", "tab\there", "# no"]
AS_TYPED += ["'single'", '"double"', "both ' and \"", "1e3", "-5", "a=b", "()", "*", 'r"raw"', "1,2", "help", "__doc__"]
AS_TYPED += ["back\\nslash", "two\nlines\n", "\u2028", "...", "🙂👩‍👧‍👦"]
AFTER_PROMPT = ["--with dashes", "--help", "-h", "-hello", "--", "", "-", "'single'", "1,2", "a=b"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_prompt_reaches_the_tokenizer_as_typed(script):
    """Alone, as the value of --prompt and after --; and then standard input is none."""
    runs = [[prompt, *SHORT] for prompt in AS_TYPED] + [[f"--prompt={prompt}", *SHORT] for prompt in AFTER_PROMPT]
    runs += [[*SHORT, "--", prompt] for prompt in AFTER_PROMPT] + [[*SHORT, "--prompt", "-", "--"]]
    prompts = AS_TYPED + 2 * AFTER_PROMPT + ["-"]
    with open(__file__) as no_prompt:
        process = start(script, *map(json.dumps, runs), code=SHOW_ENCODED, stdin=no_prompt)
    out, err, returncode = finish(process)
    assert (returncode, [json.loads(line) for line in err.splitlines()]) == (0, prompts)
    assert out == "".join(text + "\n" for text in texts_of(prompts))


def test_several_prompts_and_a_flag_that_counts_as_it_is_given_last():
    prompts = [*AS_TYPED, *AFTER_PROMPT, "one more"]
    expected = "".join(f"> {prompt}\n{text}\n" for prompt, text in zip(prompts, texts_of(prompts)))
    assert run(*AS_TYPED, "-n", "9", *SHORT, "--prompt", "one more", "--", *AFTER_PROMPT).stdout == expected


@pytest.mark.parametrize("content", ["O\n-\n", "\ufeffO\r\n1,2\r\n", "O\n\n \nO\n\n", "", " a\n é🙂\u2028\x0b \nO"])
def test_prompts_file(tmp_path, content):
    """Also with a byte order mark, blank lines and no line end at the end."""
    (tmp_path / "prompts").write_bytes(content.encode())
    prompts = content.strip("\ufeff").replace("\r", "").removesuffix("\n").split("\n") if content else []
    expected = [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts_of(prompts))]
    assert json_lines(run(*SHORT, "--prompts_file", tmp_path / "prompts")) == expected
    assert json_lines(run(*SHORT, "--prompts_file", "-", input=content)) == expected


def test_line_by_line():
    """With --batch_size 1 a program can talk to it: each line is answered before the next is there."""
    process = start(*SHORT, "--prompts_file=-", "--batch_size=1", stdin=subprocess.PIPE)
    for prompt in "Once", "", "O":
        os.write(process.stdin.fileno(), f"{prompt}\n".encode())
        line = read_until(process.stdout.fileno(), lambda text: text.endswith("\n"))
        assert json.loads(line) == {"prompt": prompt, "text": texts_of(prompt)}
    assert finish(process) == ("", "", 0)


BAD_LINES = {b"long " * 300: "256", b"caf\xe9": "UTF-8", b"\xff\xfeO": "UTF-8", b"a" * (2**21 + 1): "2.?097.?153"}


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_a_bad_line_is_told_in_its_place(tmp_path, batch_size):
    """With its number; all others get their texts, and the run ends with how many are bad."""
    lines = [b"Once", *BAD_LINES, b"O", b"", *BAD_LINES, b"There"]
    (tmp_path / "prompts").write_bytes(b"\n".join(lines))
    result = run(*SHORT, "--prompts_file", tmp_path / "prompts", "--batch_size", batch_size)
    good = [line.decode() for line in lines if line not in BAD_LINES]
    texts = iter(texts_of(good))
    for number, (line, answer) in enumerate(zip(lines, result.stdout.splitlines(), strict=True), 1):
        answer = json.loads(answer)
        assert answer.pop("prompt") == line.decode(errors="replace")
        if line in BAD_LINES:
            assert [*answer] == ["error"] and re.search(rf"(?=.*\b{number}\b).*{BAD_LINES[line]}", answer["error"])
        else:
            assert answer == {"text": next(texts)}
    assert result.returncode == 1 and re.fullmatch(r"error: .*\b8\b.*\n", result.stderr)


@pytest.mark.parametrize("codec", ["utf-16-le", "utf-16-be"])
def test_utf_16_is_named(tmp_path, codec):
    (tmp_path / "prompts").write_bytes("\ufeffOnce\nO\n".encode(codec))
    assert "UTF-16" in error_of(run(*SHORT, "--prompts_file", tmp_path / "prompts"))
    with open(tmp_path / "prompts") as file:
        assert re.fullmatch("error: .*UTF-16.*\n", finish(start(*SHORT, stdin=file))[1])


@pytest.mark.parametrize("options", [{}, {"seed": 0}, {"top_p": 0.9, "seed": 3}], ids=str)
def test_results_do_not_depend_on_the_batch(options):
    """Nor on a bad line among them."""
    prompts, flags = [golden["prompt"] for golden in GOLDEN] + ["", "Once", "Once"], [*SMALL, "--prompts_file=-"]
    flags += [f"--{name}={value}" for name, value in options.items()]
    runs = [json_lines(run(*flags, f"--batch_size={n}", input="\n".join(prompts))) for n in (1, 4)]
    bad = run(*flags, input="\n".join([*prompts[:3], "long " * 300, *prompts[4:]])).stdout.splitlines()
    runs += [[*map(json.loads, bad[:3]), runs[0][3], *map(json.loads, bad[4:])]]
    assert [line["prompt"] for line in runs[0]] == prompts
    assert runs[0] == runs[1] == runs[2]
    assert (runs[0][-1]["text"] == runs[0][-2]["text"]) == (not options)  # sampled: one prompt twice, two texts


@pytest.mark.parametrize("typed", ["Once upon", "Once\r\n", "a\r\nb\rc\n", " a\n\n- b \n\n", ""])
def test_standard_input_is_one_prompt(typed):
    assert run(*SHORT, input=typed).stdout == texts_of(re.sub(r"\r?\n\Z", "", typed)) + "\n"


@pytest.mark.parametrize("args", ["--help", "a prompt --help", "-h", "--seed -h"])
def test_help(args):
    """It tells every flag and its meaning, what is fetched, the context length, and whole words in 80 columns."""
    result = run(*args.split(), env={**NOWHERE, "COLUMNS": "80"})
    assert (result.returncode, result.stderr) == (0, "") and max(map(len, result.stdout.splitlines())) <= 80
    blocks = re.split(r"\n    (?=-)", result.stdout)
    for flag in inspect.signature(gpt2.cli).parameters.values():
        if flag.kind is not flag.VAR_POSITIONAL:
            [block] = [block for block in blocks if re.match(rf"(-\w, )?--{flag.name}=", block)]
            assert not re.match("Type:|Default:", block.rstrip().split("\n")[-1].strip())  # the last line: its meaning
    words = {word for word in inspect.getdoc(gpt2.cli).split() if not word.endswith(":")}
    assert words | {"GPT2_MODELS_URL."} <= {*result.stdout.split()}
    assert re.search(r"(?s)(?=.*124M.{0,9}500 MB)(?=.*1,?024)", result.stdout)


def test_the_examples_of_the_help_work():
    examples = re.findall("^ +python (gpt2.py .*)", gpt2.cli.__doc__, re.MULTILINE)
    assert len(examples) >= 2
    for script, prompt, *flags in map(shlex.split, examples):
        result = run(prompt, *flags, *SMALL, script=script)
        assert (result.returncode, result.stderr) == (0, "") and len(result.stdout) > 20


def test_a_character_of_several_tokens_is_shown_once_it_is_whole(model, monkeypatch, capsys):
    text, after_each = "a🙂é", []
    ids = model[0].encode(text)
    assert len(ids) > len(text)

    def generate_steps(*args, **options):
        for id in [*ids, *model[0].encode("🙂")[:1]]:
            yield [id]
            after_each.append(capsys.readouterr().out)

    monkeypatch.setattr(gpt2, "generate_steps", generate_steps)
    gpt2.cli("Once", model_size="2M")
    assert [out for out in after_each if out] == [*text]
    assert capsys.readouterr().out == "\ufffd\n"  # the end came before it was whole


# ---- What it refuses -------------------------------------------------------------------------------------------------

MISTYPED = ["--n_token_to_generate 5 hi", "hi --sed=5", "hi --json", "hi -x", "hi -t 0.8", "-hello", "hi -n5"]
MISTYPED += ["hi --temp 1", "--model 2M hi"]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("args", MISTYPED)
def test_a_mistyped_flag_is_refused_at_once(tmp_path, script, args):
    """Before 124M would be downloaded, and with the flags there are; -t may be temperature, top_k or top_p."""
    result = run(*args.split(), "--models_dir", tmp_path / "models", env=NOWHERE, script=script)
    assert (result.returncode, result.stdout, os.listdir(tmp_path)) == (2, "", [])
    assert "--model_size" in result.stderr and not re.search("Traceback|\0|-- --help", result.stderr)


REFUSED = {  # what is typed: what the line must tell
    "--n_tokens_to_generate=1.5": "n_tokens_to_generate.*'1.5'", "--temperature=nan": "temperature.*'nan'",
    "--top_k=-1": "top_k.*'-1'", "--top_p=90": "top_p.*'90'", "--batch_size=0": "batch_size.*'0'",
    "--seed": "seed.*value", "--prompt": "prompt.*value", "--models_dir": "models_dir.*value",
    "--prompt --seed=1": "prompt.*value", "-prompt -n 3": "prompt.*value", "-n -- 5": "-n.*value",
    "--prompt=a --prompt b": "--prompt", "--prompts_file=/none/such": "/none/such", "--prompts_file=-": "prompts_file",
}  # fmt: skip


@pytest.mark.parametrize("args", REFUSED)
def test_what_is_refused_is_one_line(tmp_path, args):
    """It names the flag and what was typed, before anything is fetched."""
    prompt = [] if "--prompt" in args and args != "--prompts_file=-" else ["It is True"]
    line = error_of(run(*prompt, "--models_dir", tmp_path / "models", *args.split(), env=NOWHERE))
    assert re.search(REFUSED[args], line) and os.listdir(tmp_path) == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_makes_no_sense_is_one_line(tmp_path, script):
    assert "n_tokens_to_generate" in error_of(run("hi", "-n", "x", env=NOWHERE, script=script))
    assert "needs a value" in error_of(run("hi", "--models_dir", "-n", 5, env=NOWHERE, script=script, cwd=tmp_path))
    for n, ends_well in (251, True), (252, False):  # 5 + 251 tokens = 256
        result = run("Once upon a time", *SMALL, f"--n_tokens_to_generate={n}", script=script)
        assert result.returncode == (not ends_well) and ("256" in result.stderr) == (not ends_well)
    assert "UTF-8" in error_of(run(os.fsdecode(b"bad \xff byte"), *SMALL, script=script))
    for name in "..", "", "3M":
        assert repr(name) in error_of(run("hi", f"--model_size={name}", "--models_dir=two\nlines", script=script))


LOAD = (
    "import utils; load = utils.load_encoder_hparams_and_params; utils.load_encoder_hparams_and_params = lambda *args: "
)
FAULTS = {  # what is done before the command runs: what the line must tell
    **{f"sys.modules['{name}'] = None": f"{name}.*pip install" for name in ("numpy", "regex", "fire", "requests")},
    f"{LOAD} bytes(2**62)": "Memory",
    f"{LOAD} [*load(*args)[:2], load(*args)[2] | {{'wpe': load(*args)[2]['wpe'] * float('nan')}}]": "weights",
}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: FAULTS[fault].split(".")[0])
def test_what_is_not_there_is_one_line(tmp_path, script, fault):
    """A package (one that is needed for a download alone), the memory, weights that are numbers."""
    args = ["--models_dir", tmp_path] if "requests" in fault else SMALL
    out, err, returncode = finish(
        start(script, "Once", *args, code=BEFORE.format(fault), env={**os.environ, **NOWHERE})
    )
    assert (out, returncode) == ("", 1) and re.fullmatch(rf"(fetching .*\n)?error: .*{FAULTS[fault]}.*\n", err)


# ---- How it ends -----------------------------------------------------------------------------------------------------


def test_nobody_takes_the_text():
    """A reader that has enough is no error (but may be SIGPIPE, 141), a full disk is one."""
    for args in ["gpt2.py", "Once"], ["gpt2.py", "", "Once"], ["gpt2_pico.py", "Once"], ["gpt2.py", "--help"]:
        for end, n, ok, err in ("|head -c 9", 9, [0, 141], ""), (">/dev/full", 0, [1], "error:.* space .*\n"):
            command = f'"$0" "$@" {end}; exit ${{PIPESTATUS[0]}}', sys.executable, *args, *SMALL, "-n", "99"
            result = subprocess.run(["bash", "-c", *command], cwd=ROOT, capture_output=True, text=True, check=False)
            assert result.returncode in ok and len(result.stdout) == n and re.fullmatch(err, result.stderr)


def with_streams(change, *args):
    command = ["bash", "-c", f'"$0" "$@" {change}', sys.executable, *args, "-n", "40"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", input="O", check=False)


@pytest.mark.parametrize("change", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams(change):
    """Empty input, or one line, or the text alone; nothing meant for standard error is on standard output."""
    no_input, no_output, no_error = (re.search(rf"(^| ){stream}", change) for stream in ("<&-", ">&-", "2>&-"))
    text, piped = GOLDEN[1]["text"] + "\n", gpt2.main("" if no_input else "O", 40, "2M") + "\n"
    for *args, status, out, err in (
        ("gpt2.py", "Once", *SMALL, 0, text, ""), ("gpt2_pico.py", "Once", *SMALL, 0, text, ""),
        ("gpt2.py", *SMALL, 0, piped, ""), ("gpt2.py", "--top_k=-1", 1, "", "error: .*\n"), ("gpt2.py", "-x", 2, "", "ERROR"),
    ):  # fmt: skip
        result = with_streams(change, *args)
        assert (result.returncode, result.stdout) == (status, "" if no_output else out)
        assert re.match("\\Z" if no_error else err or "\\Z", result.stderr)
    result = with_streams(change, "gpt2.py", "--help")
    assert (result.returncode, result.stderr, result.stdout[:4]) == (0, "", "" if no_output else "NAME")


def test_a_first_run_without_standard_error(models):
    """Which is also TensorFlow's, for a model that is not known."""
    with open(models / "2M/model.ckpt.data-00000-of-00001", "ab") as file:
        file.write(b"more")
    result = with_streams("2>&-", "gpt2.py", "Once", *SMALL, f"--models_dir={models}")
    assert (result.returncode, result.stdout, result.stderr) == (0, GOLDEN[1]["text"] + "\n", "")


@pytest.mark.parametrize("around", [[], ["bash", "-c", 'for i in 1 2 3; do "$@"; done', "bash"]], ids=["", "loop"])
def test_the_text_comes_token_by_token_and_ctrl_c_ends_the_run_by_the_signal(model, around):
    """Through a pipe, too; the process ends by SIGINT itself, so a shell loop around it ends as well."""
    waiting, take = pipe_of_steps()
    process = start("Once", *SMALL, waiting, code=STEP_BY_STEP, around=around, pass_fds=[waiting])
    for id in GOLDEN[1]["greedy"][:9]:
        take(1)
        token = model[0].decode([id])
        assert read_until(process.stdout.fileno(), lambda text, token=token: text == token) == token
        assert not select.select([process.stdout], [], [], 0)[0]
    os.killpg(process.pid, signal.SIGINT)
    take(99)  # for those that would go on
    assert finish(process) == ("", "", -signal.SIGINT)


@pytest.mark.parametrize("env", [{"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "", "LC_ALL": "C"}], ids=str)
def test_where_the_output_is_ascii(env):
    assert json.loads(run(*SHORT, "--prompts_file=-", input="é", env=env).stdout)["prompt"] == "é"
    result = run("é", "Once", *SMALL, env=env)
    assert (result.returncode, result.stderr) == (0, "") and result.stdout.endswith(GOLDEN[1]["text"] + "\n")


# ---- Interactive mode ------------------------------------------------------------------------------------------------


def shown(text):
    """What a terminal shows, without what steers it."""
    return re.sub(r"\x1b\[[?\d;]*[a-zA-Z]|\^C|\r", "", text)


class Terminal:
    """The command on a pseudo-terminal, when it has asked for the first time."""

    def __init__(self, *args, first="\n> ", **options):
        self.fd, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, bytes([24, 0, 80, 0, 0, 0, 0, 0]))
        streams = {"stdin": slave, "stdout": slave, "stderr": slave, "env": {**os.environ, "TERM": "vt100"}}
        control = {"preexec_fn": lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0)}
        AFTER_TEST.callback(os.close, self.fd)
        self.process = start(*SMALL, *args, **{**streams, **control, **options})
        os.close(slave)
        assert "Ctrl-D" in self.expect(first) or not first  # how to leave

    def type(self, text):
        os.write(self.fd, text.encode(errors="surrogateescape"))

    def expect(self, wanted):
        """Read on until `wanted`: what is shown before it."""
        text = shown(read_until(self.fd, lambda text: wanted in shown(text)))
        assert wanted in text
        return text.split(wanted)[0] if wanted else ""

    def answer(self, prompt):
        self.type(prompt + "\n")
        return self.expect("\n> ")

    def end(self):
        """(what is on the terminal until the process ends, its standard output if that is a pipe, returncode)."""
        out, _, returncode = finish(self.process)
        return shown(read_until(self.fd, lambda text: False)), out, returncode


def test_asks_again_and_again_until_ctrl_d(tmp_path):
    """The model is loaded once."""
    (tmp_path / "models").symlink_to(ROOT / "models")
    terminal = Terminal("--models_dir", tmp_path / "models")
    (tmp_path / "models").unlink()
    for prompt in GOLDEN[0]["prompt"], "Once", "":
        assert terminal.answer(prompt) == prompt + "\n" + gpt2.main(prompt, 40, "2M")
    assert re.search("error: .*256", terminal.answer("long " * 300))
    assert re.search("error: (?!.*codec).*UTF-8", terminal.answer("caf\udcff"))
    terminal.type("\x04")
    assert terminal.process.wait(30) == 0


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
    terminal.expect("O\n" + texts_of("O", n_tokens_to_generate=40) + "\n> ")


def test_only_text_goes_to_a_file():
    terminal = Terminal(first="\n", stdout=subprocess.PIPE)
    terminal.type("Once\n\x04")
    assert finish(terminal.process) == (GOLDEN[1]["text"] + "\n", None, 0)


def test_sampling_goes_on():
    """With a seed, a prompt (again by arrow up) gives another text the second time; another session the same two."""
    one, another = [[t.answer("Once"), t.answer("\x1b[A")] for t in (Terminal("--seed=1"), Terminal("--seed=1"))]
    assert one == another and one[0] != one[1] and one[0][:5] == one[1][:5] == "Once\n"


def test_a_random_seed_is_told():
    """On a terminal, so that the same text can be had again. 0 is a seed."""
    shown, text, _ = Terminal("Once", "--top_k=9", first="", stdout=subprocess.PIPE).end()
    [seed] = re.fullmatch(r".*seed\D(\d+)\n", shown).groups()
    assert gpt2.main("Once", 40, "2M", top_k=9, seed=int(seed)) + "\n" == text
    expected = gpt2.main("Once", 40, "2M", seed=0) + "\n"
    assert Terminal("Once", "--seed=0", first="", stdout=subprocess.PIPE).end() == ("", expected, 0)


def test_progress_of_a_batch(tmp_path, monkeypatch):
    """It is shown on a terminal, if the texts go elsewhere. Interrupted, the last line written is whole."""
    monkeypatch.setenv("TQDM_MININTERVAL", "0")
    (tmp_path / "prompts").write_text("Once\n" * 3)
    waiting, take = pipe_of_steps()
    args = "-n", 2, "--batch_size=1", "--prompts_file", tmp_path / "prompts"
    options = {"code": STEP_BY_STEP, "pass_fds": [waiting], "first": ""}
    terminal = Terminal(*args, waiting, stdout=subprocess.PIPE, **options)
    take(3)
    terminal.expect("1/3")
    terminal.type("\x03")
    line = json.dumps({"prompt": "Once", "text": texts_of("Once", n_tokens_to_generate=2)}) + "\n"
    assert terminal.end()[1:] == (line, -signal.SIGINT)
    take(5)
    assert Terminal(*args, waiting, **options).end()[0] == 3 * line


# ---- IPython and notebooks -------------------------------------------------------------------------------------------

SESSION = """
import gc, signal
before = signal.getsignal(signal.SIGINT), gc.get_freeze_count()
%run gpt2.py Once --model_size 2M -n 3
%run gpt2_pico.py Once --model_size 2M -n 3
%run gpt2.py Once --model_sise 2M
%run gpt2.py Once --model_size 2M --top_k=-1
%run gpt2.py --help
print("as before:", (signal.getsignal(signal.SIGINT), gc.get_freeze_count()) == before)
!echo the end
"""


@pytest.mark.parametrize("package", ["IPython", "ipykernel"])
def test_in_a_session(tmp_path, package, monkeypatch):
    """Texts and mistakes are shown, later output too, and the session is as it was before."""
    pytest.importorskip(package)
    for name, value in ("HOME", tmp_path), ("IPYTHONDIR", tmp_path), ("PAGER", "cat"):
        monkeypatch.setenv(name, str(value))
    (tmp_path / "session.ipy").write_text(SESSION)
    if package == "IPython":
        code = "import IPython, sys; IPython.start_ipython(sys.argv[3:])"
        text = Terminal("--simple-prompt", tmp_path / "session.ipy", code=code, first="").end()[0]
    else:
        pytest.importorskip("jupyter_client")
        with open(tmp_path / "session.ipy") as file:
            text = "".join(finish(start(code="import jupyter_client.runapp as app; app.main()", stdin=file))[:2])
    assert text.count(texts_of("Once") + "\n") == 2 and "as before: True\n" in shown(text) and "the end\n" in text
    assert re.search("(?s)(?=.*--model_sise)(?=.*top_k.*'-1')(?=.*GPT2_MODELS_URL)", text)
