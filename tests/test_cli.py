"""The command line, as a process of its own: what it takes, what it prints, what it refuses, how it ends."""

import ast
import contextlib
import fcntl
import inspect
import io
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

import encoder
import gpt2

os.environ.pop("PYTHONUNBUFFERED", None)  # it would hide what is not flushed
SCRIPTS = ["gpt2.py", "gpt2_pico.py"]
SMALL = ["--model_size", "2M"]
SHORT = [*SMALL, "--n_tokens_to_generate", "3"]
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
import gpt2, sys, utils
plain = gpt2.generate
def generate(*args, on_token, **kwargs):
    def step(row, id):
        on_token(row, id)
        sys.stdin.readline()
    return plain(*args, on_token=step, **kwargs)
gpt2.generate = generate
utils.run(gpt2.cli)
"""
INTERRUPT_GENERATION = """
import os, signal, sys, utils
module = __import__(sys.argv.pop(1))
plain, calls = module.gpt2, []
def gpt2(*args, **kwargs):
    calls.append(1)
    if len(calls) == 5:
        os.kill(os.getpid(), signal.SIGINT)
    return plain(*args, **kwargs)
module.gpt2 = gpt2
utils.run(getattr(module, "cli", module.main))
"""
INTERRUPT_IMPORT = """
import os, signal, sys
name = sys.argv.pop(1)
class Finder:
    def find_spec(self, wanted, path=None, target=None):
        if wanted == name:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
import gpt2, utils
utils.run(gpt2.cli)
"""
STUCK_ONCE = """
import gpt2, time, utils
plain, first = gpt2.generate, [True]
def generate(*args, on_token, **kwargs):
    def stuck(row, id):
        stay = [first.pop() for _ in first[:]]
        on_token(row, id)
        while stay:
            time.sleep(0.1)
    return plain(*args, on_token=stuck, **kwargs)
gpt2.generate = generate
utils.run(gpt2.cli)
"""


def start(*args, code=None, **streams):
    """The command, or a program in its place, as a process that runs on meanwhile."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a child would inherit that it is ignored
    command = [sys.executable, *(["-c", code] if code else ["gpt2.py"]), *args]
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    return subprocess.Popen(command, encoding="utf-8", cwd=ROOT, **streams)


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
    return gpt2.main(prompts, **{"model_size": "2M", "models_dir": ROOT / "models", **options})


def json_lines(result):
    assert (result.returncode, result.stderr) == (0, "")
    return [json.loads(line) for line in result.stdout.split("\n")[:-1]]


# ---- What it takes and prints ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: golden["prompt"])
def test_golden_text_and_nothing_else(script, golden):
    result = run(golden["prompt"], *SMALL, script=script)
    assert (result.returncode, result.stdout, result.stderr) == (0, golden["text"] + "\n", "")


def test_main_returns_the_text_and_prints_nothing(capfd):
    assert texts_of("Once") == GOLDEN[1]["text"]
    assert texts_of(["Once", "O"]) == [GOLDEN[1]["text"], GOLDEN[0]["text"]]
    assert capfd.readouterr() == ("", "")


AS_TYPED = ["hello, world", "123", "[1, 2]", "True", "None", "", "{'a': 1}", " leading space", "-", "tab\there", "# no"]
AS_TYPED += ["'single'", '"double"', "both ' and \"", "🙂👩‍👧‍👦"]
MORE = [
    "1e3",
    "0x10",
    "-5",
    "a=b",
    "()",
    "*",
    "it's",
    'r"raw"',
    "back\\nslash",
    "two\nlines\n",
    "\u2028",
    "help",
    "$HOME",
]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("args", "prompt"),
    [([prompt], prompt) for prompt in AS_TYPED]
    + [([f"--prompt={prompt}"], prompt) for prompt in ("--starts with dashes", "-h", "a=b", "'x'", "")]
    + [(["--prompt", prompt], prompt) for prompt in ("hello, world", "-")],
    ids=repr,
)
def test_a_prompt_reaches_the_tokenizer_as_typed(script, args, prompt):
    returncode, out, err = finish(start(script, *args, *SHORT, code=SHOW_ENCODED))
    assert (returncode, [ast.literal_eval(line) for line in err.splitlines()]) == (0, [prompt])
    assert out == texts_of(prompt, n_tokens_to_generate=3) + "\n"


def test_several_prompts_as_typed():
    expected = zip(AS_TYPED + MORE, texts_of(AS_TYPED + MORE, n_tokens_to_generate=3))
    assert run(*AS_TYPED, *MORE, *SHORT).stdout == "".join(f"> {prompt}\n{text}\n" for prompt, text in expected)


def test_json():
    expected = zip(AS_TYPED + MORE, texts_of(AS_TYPED + MORE, n_tokens_to_generate=3))
    lines = json_lines(run(*AS_TYPED, *MORE, *SHORT, "--json"))
    assert lines == [{"prompt": prompt, "text": text} for prompt, text in expected]
    [alone] = json_lines(run("--json", "Once", *SMALL))
    assert alone == {"prompt": "Once", "text": GOLDEN[1]["text"]}
    assert "é" in run("é", *SHORT, "--json").stdout


@pytest.mark.parametrize("path", ["file", "-"])
@pytest.mark.parametrize(
    ("content", "prompts"),
    [
        (b"Once\nO\n", ["Once", "O"]),
        (b"Once\nO", ["Once", "O"]),
        (b"Once\r\nO\r\n", ["Once", "O"]),
        (b"Once\n\n \nO\n\n", ["Once", "", " ", "O", ""]),
        (b"\n", [""]),
        (b"", []),
        ("hello, world\n-\n--json\n  é🙂\u2028\x0b \n".encode(), ["hello, world", "-", "--json", "  é🙂\u2028\x0b "]),
    ],
)
def test_prompts_file(tmp_path, path, content, prompts):
    (tmp_path / "prompts").write_bytes(content)
    args = ["--prompts_file", tmp_path / "prompts" if path == "file" else "-", *SHORT]
    texts = texts_of(prompts, n_tokens_to_generate=3)
    lines = json_lines(run(*args, "--json", input=content.decode()))
    assert lines == [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts)]
    expected = "".join(f"> {prompt}\n{text}\n" for prompt, text in zip(prompts, texts))
    assert run(*args, input=content.decode()).stdout == expected


@pytest.mark.parametrize("options", [{}, {"temperature": 1, "seed": 3}, {"top_p": 0.9, "seed": 3}], ids=str)
def test_results_do_not_depend_on_the_batch(options):
    prompts = [golden["prompt"] for golden in GOLDEN] + ["", "Once", "Once"]
    flags = [f"--{name}={value}" for name, value in options.items()]
    runs = [
        json_lines(run("--prompts_file=-", "--json", *SMALL, *flags, f"--batch_size={n}", input="\n".join(prompts)))
        for n in (1, 4, 32)
    ]
    assert [line["prompt"] for line in runs[0]] == prompts
    assert runs[0] == runs[1] == runs[2]
    assert (runs[0][-1]["text"] == runs[0][-2]["text"]) == (not options)  # sampled: one prompt twice, two texts
    assert runs[0][0]["text"] == run(prompts[0], *SMALL, *flags).stdout.removesuffix("\n")


@pytest.mark.parametrize(
    ("typed", "prompt"),
    [
        ("Once upon", "Once upon"),
        ("Once\n", "Once"),
        ("Once\r\n", "Once"),
        ("a\r\nb\rc\n", "a\r\nb\rc"),
        (" a\n\n- b \n\n", " a\n\n- b \n"),
        ("", ""),
    ],
)
def test_standard_input_is_one_prompt(typed, prompt):
    text = texts_of(prompt, n_tokens_to_generate=3)
    assert json_lines(run(*SHORT, "--json", input=typed)) == [{"prompt": prompt, "text": text}]
    assert run(*SHORT, input=typed).stdout == text + "\n"


def test_help_tells_every_flag_its_meaning_and_its_default():
    result = run("--help")
    assert result.returncode == 0
    blocks = re.split(r"\n    (?=-)", result.stdout + result.stderr)
    for flag in FLAGS:
        [block] = [block for block in blocks if re.match(rf"(-\w, )?--{flag.name}=", block)]
        assert f"Default: {flag.default!r}" in block
        assert not re.match("Type:|Default:", block.rstrip().split("\n")[-1].strip())


# ---- What it refuses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args",
    [
        ["--n_token_to_generate", "5", "hi"],
        ["hi", "--n_token_to_generate=5"],
        ["hi", "--temprature", "1"],
        ["hi", "--jsn"],
        ["hi", "-x"],
        ["hi", "-t", "0.8"],  # temperature, top_k or top_p?
        ["hi", "-m=2M"],
        ["-hello"],
        ["--hel\nlo"],
        ["--"],
        ["hi", "--seed"],
        ["--seed", "--json", "hi"],
    ],
    ids=" ".join,
)
def test_a_mistyped_flag_is_refused_at_once(tmp_path, args):
    result = run(*args, "--models_dir", tmp_path / "models", env=NOWHERE)  # 124M, which would be downloaded
    assert (result.returncode, result.stdout, os.listdir(tmp_path)) == (2, "", [])
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ") and next(" ".join(arg.split()) for arg in args if arg[0] == "-") in line
    assert "needs a value" in line or all(f"--{flag.name}" in line for flag in FLAGS)


@pytest.mark.parametrize("args", [[], ["hi", "3", "2M", "models", "one more"], ["hi", "--prompt", "ho"]], ids=" ".join)
def test_pico_takes_one_prompt(args):
    result = run(*args, script="gpt2_pico.py")
    assert (result.returncode, result.stdout, len(result.stderr.splitlines())) == (2, "", 1)
    assert result.stderr.startswith("error: ")


@pytest.mark.parametrize(
    "args", [["--prompt=a", "--prompt=b"], ["-n", "3", "hi", "--n-tokens-to-generate=3"]], ids=" ".join
)
def test_a_flag_may_be_there_once(args):
    result = run(*args, *SMALL)
    name = args[-1].split("=")[0].replace("-", "_").replace("__", "--")
    assert (result.returncode, result.stdout, result.stderr) == (2, "", f"error: {name} is there twice\n")


@pytest.mark.parametrize(("flag", "value"), [("--json", "false"), ("-j", "True")])
def test_a_switch_takes_its_value_with_an_equals_sign(flag, value):
    result = run("hi", flag, value, *SMALL)
    assert (result.returncode, result.stdout, result.stderr) == (2, "", f"error: write {flag}={value}\n")


NUMBERS = {
    "n_tokens_to_generate": [0, -1, 1.5, "many", "", float("inf")],
    "temperature": [-1, float("nan"), float("inf"), "warm"],
    "top_k": [-1, 1.5, "x"],
    "top_p": [0, -0.1, 1.1, float("nan"), "x"],
    "seed": [-1, 1.5],
    "batch_size": [0, 1.5, "x"],
}
BAD_INPUT = [(None, {name: value}, [name, str(value)]) for name, values in NUMBERS.items() for value in values] + [
    (None, {"model_size": name}, [repr(name)]) for name in ("../2M", "..", ".", "", "2M/", "\n")
]
BAD_INPUT += [
    (None, {"model_size": "3M"}, ["'3M'", "124M", "355M", "774M", "1558M", "2M"]),
    (None, {"models_dir": __file__}, [__file__]),
    (None, {"models_dir": ROOT / "tests/none"}, ["'2M'", "124M"]),
    ("Once upon a time", {"n_tokens_to_generate": 252}, ["5", "252", "256"]),
    ("hi", {"n_tokens_to_generate": 10**400}, ["0000", "256"]),
    ("a" * 5000, {}, ["40", "256"]),
    (os.fsdecode(b"bad \xff byte"), {}, [r"\udcff"]),
]


@pytest.mark.parametrize(("prompt", "options", "words"), BAD_INPUT, ids=lambda value: str(value)[:40])
def test_bad_input_is_one_line(monkeypatch, models, prompt, options, words):
    """In Python and as a command, and before the weights are looked at."""
    options = {"model_size": "2M", "models_dir": models, **options}
    prompt = "hi" if prompt is None else prompt
    with monkeypatch.context() as patch:
        patch.setattr("utils.load_gpt2_params_from_tf_ckpt", None)
        with pytest.raises((ValueError, OSError)) as error:
            gpt2.main(prompt, **options)
    assert "\n" not in str(error.value)
    result = run(prompt, *(f"--{name}={value}" for name, value in options.items()))
    assert "checking" not in result.stderr
    for line in str(error.value), error_of(result):
        assert all(word in line for word in words)


def test_exactly_the_context_length_works():
    assert len(texts_of("Once upon a time", n_tokens_to_generate=251)) > 251  # 5 + 251 tokens = 256


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["hi", "--n_tokens_to_generate", "0"], ["0"]),
        (["hi", "--n_tokens_to_generate", "-1"], ["-1"]),
        (["hi", "--n_tokens_to_generate", "1.5"], ["1.5"]),
        (["hi", "--n_tokens_to_generate", "x"], ["'x'"]),
        (["Once upon a time", "--n_tokens_to_generate", "252"], ["5", "252", "256"]),
        ([os.fsdecode(b"\xff")], [r"\udcff"]),
        (["hi", "--model_size", ".."], ["'..'"]),
        (["hi", "--model_size", "3M"], ["'3M'", "124M", "2M"]),
        (["hi", "--models_dir", __file__], [__file__]),
    ],
)
def test_bad_input_of_pico(args, words):
    line = error_of(run(*args, *([] if "--model_size" in args else SMALL), script="gpt2_pico.py"))
    assert all(word in line for word in words)


def test_bad_prompts_files(tmp_path):
    (tmp_path / "latin-1").write_bytes(b"caf\xe9\n")
    for name in "none", "latin-1", ".":
        assert str(tmp_path / name) in error_of(run(*SMALL, "--prompts_file", tmp_path / name))
    assert "--prompts_file" in error_of(run(*SMALL, "hi", "--prompts_file", tmp_path / "latin-1"))
    (tmp_path / "long").write_text("short\n" + "long " * 300)
    assert "256" in error_of(run(*SMALL, "--prompts_file", tmp_path / "long"))


def test_a_prompt_of_10_megabytes_is_refused_unread(monkeypatch):
    assert "256" in error_of(run(*SMALL, input="a" * 10_000_000))
    monkeypatch.setattr(encoder.Encoder, "encode", None)
    with pytest.raises(ValueError, match="256"):
        texts_of("a" * 10_000_000)


# ---- How it ends -----------------------------------------------------------------------------------------------------

MODES = {"one": ["Once"], "several": ["Once", "O"], "json": ["Once", "--json"], "pico": ["Once"]}
in_every_mode = pytest.mark.parametrize("mode", MODES)


def start_mode(mode, **streams):
    code = "import gpt2_pico, utils; utils.run(gpt2_pico.main)" if mode == "pico" else None
    return start(*MODES[mode], *SMALL, code=code, **streams)


@in_every_mode
def test_a_reader_that_has_gone_is_no_error(mode):
    reader, writer = os.pipe()
    os.close(reader)
    process = start_mode(mode, stdout=writer)
    os.close(writer)
    returncode, _, err = finish(process)
    assert (returncode, err) == (141, "")  # what a shell reports for SIGPIPE


def test_head_gets_what_it_wants():
    command = f'"{sys.executable}" gpt2.py Once --model_size 2M --n_tokens_to_generate 200 | head -c 10'
    result = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (result.stdout, result.stderr) == (GOLDEN[1]["text"][:10], "")


@in_every_mode
def test_a_full_disk_is_an_error(mode):
    with open("/dev/full", "w") as full:
        returncode, _, err = finish(start_mode(mode, stdout=full))
    assert (returncode, len(err.splitlines())) == (1, 1)
    assert err.startswith("error: ") and "No space left" in err


@in_every_mode
def test_ctrl_c_during_a_generation(mode):
    module = "gpt2_pico" if mode == "pico" else "gpt2"
    returncode, out, err = finish(start(module, *MODES[mode], *SMALL, code=INTERRUPT_GENERATION))
    assert (returncode, err) == (130, "")
    assert out.strip() == (GOLDEN[1]["text"][: len(out.strip()) + 1].strip() if mode == "one" else "")


@pytest.mark.parametrize("name", ["tensorflow", "tensorflow.python.framework.dtypes"])
def test_ctrl_c_while_loading(models, name):
    returncode, out, err = finish(start(name, "Once", *SMALL, "--models_dir", str(models), code=INTERRUPT_IMPORT))
    assert (returncode, out) == (130, "")
    assert err in ("", "checking 2M …\n")


# ---- Streaming -------------------------------------------------------------------------------------------------------


def test_the_text_comes_token_by_token_through_a_pipe(model):
    process = start("Once", *SMALL, code=STEP_BY_STEP, stdin=subprocess.PIPE)
    try:
        for id in GOLDEN[1]["greedy"][:10]:
            token = model[0].decode([id])
            assert read_until(process.stdout.fileno(), lambda text, token=token: text == token) == token
            assert not select.select([process.stdout], [], [], 0)[0]
            process.stdin.write("\n")
            process.stdin.flush()
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("text", ["a🙂é漢👩‍👧 z", "🙂", "é\n"])
def test_a_character_of_several_tokens_is_shown_when_whole(monkeypatch, model, capsys, text):
    ids = ids_of_bytes(model[0], text.encode())
    shown = []

    def generate(*_, on_token, **__):
        for id in ids:
            on_token(0, id)
            shown.append(capsys.readouterr().out)
        return [ids]

    monkeypatch.setattr(gpt2, "generate", generate)
    gpt2.cli("hi", model_size="2M", models_dir=ROOT / "models")
    so_far = ["".join(shown[: i + 1]) for i in range(len(shown))]
    assert so_far == [text.encode()[: i + 1].decode("utf-8", "ignore") for i in range(len(ids))]
    assert capsys.readouterr().out == "\n"


@pytest.mark.parametrize("data", [b"a\xff\xf0\x9f\x99\x82", b"\xf0\x9f", b"\xf0a", b"\x82"])
def test_shown_as_decoded_where_tokens_are_no_text(monkeypatch, model, capsys, data):
    ids = ids_of_bytes(model[0], data)
    monkeypatch.setattr(gpt2, "generate", lambda *_, on_token, **__: [[on_token(0, id) or id for id in ids]])
    gpt2.cli("hi", model_size="2M", models_dir=ROOT / "models")
    assert capsys.readouterr().out == model[0].decode(ids) + "\n"


def ids_of_bytes(encoder_, data):
    return [encoder_.encoder[encoder.bytes_to_unicode()[byte]] for byte in data]


# ---- Interactive mode ------------------------------------------------------------------------------------------------


def shown(text):
    """What a terminal shows, without what steers it."""
    return re.sub(r"\x1b\[[?\d;]*[a-zA-Z]|\^C|\r", "", text)


class Terminal:
    """The command on a pseudo-terminal."""

    def __init__(self, *args, code=None):
        self.fd, slave = pty.openpty()
        self.process = start(
            *args,
            code=code,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            env={**os.environ, "TERM": "vt100"},
        )
        os.close(slave)

    def type(self, text):
        os.write(self.fd, text.encode())

    def expect(self, wanted):
        """Read on until `wanted`: what is shown before it."""
        text = shown(read_until(self.fd, lambda text: wanted in shown(text)))
        assert wanted in text
        return text.split(wanted)[0]

    def ends(self, key):
        """Type a key until it ends (readline misses one in the moment in which it shows its prompt): the exit status."""
        for _ in range(30):
            self.type(key)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(1)
                break
        text = read_until(self.fd, lambda _: False, seconds=0)
        assert shown(text).strip() == ""
        return self.process.poll()


@pytest.fixture
def terminal():
    with contextlib.ExitStack() as stack:

        def open_terminal(*args, code=None):
            terminal = Terminal(*SMALL, *args, code=code)
            stack.callback(os.close, terminal.fd)
            stack.callback(terminal.process.wait)
            stack.callback(terminal.process.kill)
            terminal.expect("> ")
            return terminal

        yield open_terminal


@pytest.mark.parametrize("key", ["\x03", "\x04"], ids=["Ctrl-C", "Ctrl-D"])
def test_asks_again_and_again_until_the_end(terminal, key):
    terminal = terminal()
    for golden in GOLDEN[:3]:
        terminal.type(golden["prompt"] + "\n")
        assert terminal.expect("\n> ") == golden["prompt"] + "\n" + golden["text"]
    assert terminal.ends(key) == 0


def test_ctrl_c_ends_a_generation_alone(terminal):
    terminal = terminal(code=STUCK_ONCE)
    terminal.type("Once\n")
    terminal.expect("Once\n upon")
    terminal.type("\x03")
    terminal.expect("\n> ")
    terminal.type("Once\n")
    terminal.expect(GOLDEN[1]["text"] + "\n> ")
    assert terminal.ends("\x04") == 0


def test_a_prompt_that_is_too_long_is_asked_again(terminal):
    terminal = terminal()
    terminal.type("long " * 300 + "\n")
    assert re.search(r"error: .*\b40\b.*\b256\b", terminal.expect("\n> "))
    terminal.type("Once\n")
    terminal.expect(GOLDEN[1]["text"] + "\n> ")


def test_what_is_typed_is_a_prompt_as_it_is(terminal):
    terminal = terminal("--n_tokens_to_generate", "3")
    for prompt in "hello, world", "  --seed 5 é🙂 ", "":
        terminal.type(prompt + "\n")
        assert terminal.expect("\n> ").endswith("\n" + texts_of(prompt, n_tokens_to_generate=3))


def test_line_editing_and_history(terminal):
    pytest.importorskip("readline")
    terminal = terminal()
    terminal.type("Oncf\x7fe\n")  # a slip, mended with backspace
    terminal.expect(GOLDEN[1]["text"] + "\n> ")
    terminal.type("\x1b[A\n")  # arrow up
    assert terminal.expect(GOLDEN[1]["text"] + "\n> ").startswith("Once\n")
    terminal.type("nce\x01O\n")  # Ctrl-A: to the start of the line
    terminal.expect(GOLDEN[1]["text"] + "\n> ")


def test_the_model_is_loaded_once(monkeypatch, capsys):
    """And sampling goes on: the second time, the same prompt gives another text."""
    loads, asked = [], iter(["Once", "Once"])
    plain = gpt2.load
    monkeypatch.setattr(gpt2, "load", lambda *args: loads.append(args) or plain(*args))
    monkeypatch.setattr("builtins.input", lambda _: next(asked, None) or (_ for _ in ()).throw(EOFError))
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr("os.isatty", lambda fd: True)
    gpt2.cli(model_size="2M", models_dir=ROOT / "models", temperature=1, seed=1)
    first, second, _ = capsys.readouterr().out.split("\n")
    assert len(loads) == 1 and first != second


# ---- Odd surroundings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("closed", "text"), [("<&-", " upon a\n"), ("2>&-", " upon a\n"), (">&-", ""), ("<&- >&- 2>&-", "")]
)
def test_closed_streams(closed, text):
    command = f"'{sys.executable}' gpt2.py Once {' '.join(map(str, SMALL))} -n 2 {closed}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == (text, "")


@pytest.mark.parametrize("closed", ["<&-", "2>&-", ">&-", "<&- >&- 2>&-"])
def test_help_with_closed_streams(closed):
    command = f"'{sys.executable}' gpt2.py --help {closed}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ("--seed" in done.stderr) == ("2>" not in closed) and "Traceback" not in done.stderr


def test_json_where_the_output_is_ascii():
    result = run("é", *SHORT, "-j", env={"PYTHONIOENCODING": "ascii"})
    assert json_lines(result)[0]["prompt"] == "é" and result.stdout.isascii()


@pytest.mark.parametrize("value", ["1", "yes", ""])
def test_json_is_true_or_false(value):
    assert "json" in error_of(run("Once", *SMALL, f"--json={value}"))
