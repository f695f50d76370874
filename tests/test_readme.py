"""What the README shows is what comes out: its snippets and commands are run."""

import importlib.util
import re
import shutil
import socket
import subprocess
import sys

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text("utf-8")
SNIPPET = re.compile(r"```python\n(.*?)```\n```text\n(.*?)```", re.DOTALL)
SESSIONS = [found for section in README.split("\n## ") if (found := SNIPPET.findall(section))]
COMMANDS = re.findall(r"```console\n\$ (.*?)\n(.*?)```", README, re.DOTALL)
FIRST = re.findall(r"```\npip install [a-z ]*\n(python gpt2.py .*?)\n```\n```\n(.*?)```", README, re.DOTALL)
HAS_JAX = importlib.util.find_spec("jax")


def output_of(command):
    options = {"capture_output": True, "encoding": "utf-8", "stdin": subprocess.DEVNULL}
    return subprocess.run(command, cwd=ROOT, check=True, **options).stdout


def test_every_block_is_run():
    """No Python block without the output that is compared, no command without its own."""
    assert len([*SNIPPET.finditer(README)]) == README.count("```python") == 10
    assert len(COMMANDS) == README.count("```console") == 5
    assert len(FIRST) == 1


@pytest.mark.parametrize("session", SESSIONS, ids=lambda session: f"{len(session)} snippets")
def test_session(session):
    """The snippets of a section, each of which goes on where the one before it stopped."""
    codes, expected = zip(*[snippet for snippet in session if HAS_JAX or "import jax" not in snippet[0]])
    assert output_of([sys.executable, "-c", "print(end='\\0')\n".join(codes)]).split("\0") == list(expected)


@pytest.mark.skipif(not HAS_JAX, reason="JAX is optional: pip install jax")
def test_several_machines():
    """The JAX snippet in two processes, as on two machines: each has half of the batch, and the loss is the same."""
    first, (code, expected) = SESSIONS[-1][0][0], SESSIONS[-1][-1]
    lines = expected.splitlines(keepends=True)  # after six steps, which take a while, two losses are to be seen
    expected = "".join(lines[:2] + lines[6:7]).replace("on 8 devices, on each (2,", "on 2 devices, on each (8,")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    join = 'jax.config.update("jax_cpu_collectives_implementation", "gloo")\n'  # what connects processors
    join += f'jax.distributed.initialize("{address}", 2, int(sys.argv[1]))\n'
    for old, new in ("count=8", "count=1"), ("range(30)", "range(6)"), ("gpt2.np = jnp", f"{join}gpt2.np = jnp"):
        code = code.replace(old, new)
    command = [sys.executable, "-c", f"import sys\n{first}{code}"]
    processes = [subprocess.Popen([*command, number], cwd=ROOT, stdout=subprocess.PIPE, text=True) for number in "01"]
    try:
        for process in processes:
            assert expected in process.communicate(timeout=120)[0]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.parametrize("command, expected", COMMANDS + FIRST)
def test_command(command, expected):
    if "jq" in command and not shutil.which("jq"):
        pytest.skip("jq is not installed")
    assert output_of(["bash", "-c", command.replace("python gpt2.py", f"'{sys.executable}' gpt2.py")]) == expected
