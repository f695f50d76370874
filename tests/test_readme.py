"""What the README shows is what comes out: its blocks and commands are run, in a copy, so that nothing stays behind."""

import ast
import json
import re
import shutil
import sys
from importlib.util import find_spec
from subprocess import check_output

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text("utf-8")
BLOCK = re.compile(r"```python\n(.*?)```(?:\n```text\n(.*?)```)?", re.DOTALL)
SESSIONS = {part.split("\n")[0]: blocks for part in README.split("\n## ") if (blocks := BLOCK.findall(part))}
[SAVE] = [code for blocks in SESSIONS.values() for code, text in blocks if not text]
COMMANDS = re.findall(r"^\$ (.*)\n((?:[^$`].*\n)*)", README, re.MULTILINE)
COMMANDS += re.findall(r"\npip install .* && (python gpt2.py .*)\n```\n\n((?:>.*\n)*)", README)
LACKED = [name for name in ("jax", "tensorflow") if not find_spec(name)]
RUN = r"""
import contextlib, io, json, sys
def slip(frame, event, argument):
    if (frame.f_code.co_filename, frame.f_lineno) == ("<block>", line):
        raise KeyboardInterrupt
    return slip
names = {}
for code, lines in json.load(sys.stdin):
    for line in [*lines, None]:
        with contextlib.suppress(KeyboardInterrupt), contextlib.redirect_stdout(io.StringIO()) as output:
            sys.settrace(line and slip)
            exec(compile(code, "<block>", "exec"), names)
            assert line is None, f"not reached: line {line} of {code}"
    print(json.dumps(output.getvalue()))
"""


def statements(code):
    """The lines on which statements begin, but the first; a fourth of them if the block takes seconds."""
    lines = sorted({node.lineno for node in ast.walk(ast.parse(code)) if isinstance(node, ast.stmt)})
    return lines[1 :: 4 if "jax" in code or "tensorflow" in code else 1]


def test_every_block_is_run():
    """No Python block but save() without the output that is compared, no command without its own."""
    assert README.count("```python") == sum(map(len, SESSIONS.values())) == 12
    assert README.count("\n$ ") + 1 == len(COMMANDS) == 4 and "def save(" in SAVE


@pytest.mark.parametrize("stopped", [False, True], ids=["as it stands", "after slips"])
@pytest.mark.parametrize("title", SESSIONS)
def test_session(title, stopped, models):
    """Each block goes on where the one before ended; or is stopped at one line after the other, and pasted again."""
    for path in [*ROOT.glob("*.py"), ROOT / "LICENSE"]:
        shutil.copy(path, models.parent)
    blocks = [(SAVE * ("save(" in code) + code, text) for code, text in SESSIONS[title] if code != SAVE]
    blocks = [(code, text) for code, text in blocks if not any(name in code for name in LACKED)]
    given = json.dumps([(code, statements(code) if stopped else []) for code, _ in blocks])
    output = check_output([sys.executable, "-c", RUN], cwd=models.parent, input=given, text=True, timeout=300)
    assert [json.loads(line) for line in output.splitlines()] == [text for _, text in blocks]


@pytest.mark.skipif(not shutil.which("bash"), reason="they are for a shell")
@pytest.mark.parametrize("command, text", COMMANDS, ids=[command for command, _ in COMMANDS])
def test_command(command, text):
    """The words are those that stand below it; how they are broken into lines does not matter."""
    command = command.replace("python gpt2.py", f"'{sys.executable}' gpt2.py")
    output = check_output(["bash", "-c", command], cwd=ROOT, encoding="utf-8", timeout=300)
    assert output.split() == re.sub("^> ", "", text, flags=re.MULTILINE).split()
