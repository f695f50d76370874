"""What the README shows is what comes out: its snippets and commands are run."""

import importlib.util
import re
import subprocess
import sys

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text("utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```\n```text\n(.*?)```", README, re.DOTALL)
COMMANDS = re.findall(r"```console\n\$ (.*?)\n(.*?)```", README, re.DOTALL)
FIRST = re.findall(
    r"```\npip install -r requirements.txt && (python gpt2.py .*?)\n```\n```\n(.*?)```", README, re.DOTALL
)


def output_of(command):
    options = {"capture_output": True, "encoding": "utf-8", "stdin": subprocess.DEVNULL}
    return subprocess.run(command, cwd=ROOT, check=True, **options).stdout


def test_every_block_is_run():
    """No Python block without the output that is compared, no command without its own."""
    assert len(SNIPPETS) == README.count("```python") >= 4
    assert len(COMMANDS) == README.count("```console") == 2
    assert len(FIRST) == 1


@pytest.mark.parametrize("code, expected", SNIPPETS)
def test_snippet(code, expected):
    if "jax" in code and not importlib.util.find_spec("jax"):
        pytest.skip("JAX is not installed")
    assert output_of([sys.executable, "-c", code]) == expected


@pytest.mark.parametrize("command, expected", COMMANDS + FIRST)
def test_command(command, expected):
    assert output_of(["bash", "-c", command.replace("python gpt2.py", f"'{sys.executable}' gpt2.py")]) == expected
