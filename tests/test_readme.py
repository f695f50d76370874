"""What the README shows is what comes out: its snippets and commands are run, its numbers counted."""

import importlib.util
import re
import subprocess
import sys

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text("utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```\n```text\n(.*?)```", README, re.DOTALL)
COMMANDS = re.findall(r"```console\n\$ (.*?)\n(.*?)```", README, re.DOTALL)


def output_of(command):
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, encoding="utf-8", stdin=subprocess.DEVNULL, check=True
    )
    return done.stdout


def test_every_block_is_run():
    """No Python block without the output that is compared, no command without its own."""
    assert len(SNIPPETS) == README.count("```python") >= 5
    assert len(COMMANDS) == README.count("```console") == 3


@pytest.mark.parametrize("code, expected", SNIPPETS)
def test_snippet(code, expected):
    if "jax" in code and not importlib.util.find_spec("jax"):
        pytest.skip("JAX is not installed")
    assert output_of([sys.executable, "-c", code]) == expected


@pytest.mark.parametrize("command, expected", COMMANDS)
def test_command(command, expected):
    assert output_of(["bash", "-c", command.replace("python gpt2.py", f"'{sys.executable}' gpt2.py")]) == expected


def test_line_counts():
    """The counts of lines in the README are those of the files."""
    for name, lines in re.findall(r"`(\w+\.py)` (\d+)", README):
        assert len((ROOT / name).read_text("utf-8").splitlines()) == int(lines), name
    forward = (ROOT / "gpt2_pico.py").read_text("utf-8").split("def generate")[0].split("import utils\n")[1]
    assert f" in {sum(map(bool, map(str.strip, forward.splitlines())))} lines" in README
