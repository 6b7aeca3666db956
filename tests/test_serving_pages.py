"""The commands of the pages on serving and tiers, in their order, on loopback and free ports."""

import contextlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import trustme
from test_docs import DOCS, run_page

from eejax.server.commands import started

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="the pages use curl")


def commands(page):
    """The lines of the page's shell blocks."""
    blocks = re.findall(r"```sh\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    return [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]


@contextlib.contextmanager
def running(line, **changes):
    """A command that serves: what it said; changes are texts to replace."""
    for old, new in {"0.0.0.0": "127.0.0.1", **changes}.items():
        line = line.replace(old, new)
    words = [sys.executable, "-m", "eejax.commands", *shlex.split(line)[1:]]
    process, said = started([*words, "--rest-port", "0", "--grpc-port", "0", "--threads", "1"])
    try:
        yield said
    finally:
        process.terminate()
        assert process.wait(60) == 0


def curl(line, said, *flags):
    """What it printed."""
    line = line.replace("localhost:8080", f"127.0.0.1:{said['rest']}")
    words = shlex.split(line.replace("127.0.0.1", "http://127.0.0.1") if not flags else line)
    done = subprocess.run([*words, *flags], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def artifact(tmp_path, monkeypatch):
    """What the page on serving makes: an artifact of three exits, and a request."""
    monkeypatch.chdir(tmp_path)
    _, blocks = run_page("serving.md")
    assert blocks == 3
    return Path("artifact")


def test_the_page_on_serving(artifact):
    install, serve, *asks, secured = commands("serving.md")
    assert install == 'pip install "eejax[serving]"'
    with running(serve) as said:
        ready, model, answer, metrics = (curl(ask, said) for ask in asks)
    assert json.loads(ready)["ready"]
    assert json.loads(model)["inputs"][0]["shape"] == [-1, 16, 16, 3]
    outputs = {tensor["name"]: tensor["data"] for tensor in json.loads(answer)["outputs"]}
    page = (DOCS / "serving.md").read_text()
    assert set(outputs) <= set(re.findall(r"`(\w+)`", page))
    assert len(outputs["exits"]) == 2
    # Every metric is on the page, by its name or by that of its family.
    for name in set(re.findall(r"^(eejax_\w+)", metrics, re.MULTILINE)):
        family = re.sub(r"_(bucket|sum|count|created)$", "", name)
        assert family in page or f"{family}_total" in page, name

    authority = trustme.CA()
    authority.cert_pem.write_to_path("ca.pem")
    for name in ("server", "client"):
        issued = authority.issue_cert("127.0.0.1")
        issued.private_key_and_cert_chain_pem.write_to_path(f"{name}.pem")
        issued.private_key_pem.write_to_path(f"{name}.key")
    Path("tokens").write_text("a-token-that-is-long-enough\n")
    Path("tokens").chmod(0o600)
    with running(secured) as said:
        flags = ["--cacert", "ca.pem", "--cert", "client.pem"]
        flags += ["-H", "Authorization: Bearer a-token-that-is-long-enough"]
        line = asks[2].replace("localhost", "https://localhost")
        assert "outputs" in json.loads(curl(line, said, *flags))


def test_the_page_on_tiers(artifact):
    together, ask, last, middle, first = commands("tiers.md")
    words = [sys.executable, "-m", "eejax.commands", *shlex.split(together)[1:]]
    process = subprocess.Popen(
        [*words, "--rest-port", "0", "--grpc-port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(4)]
        assert [line.split()[1] for line in lines[:3]] == ["2:3", "1:2", "0:1"]
        said = {"rest": re.findall(r"REST 127\.0\.0\.1:(\d+)", lines[2])[0]}
        whole = json.loads(curl(ask, said))
        process.terminate()
        assert process.wait(60) == 0

    with (
        running(last) as cloud,
        running(middle, **{"cloud:8081": f"127.0.0.1:{cloud['grpc']}"}) as edge,
        running(first, **{"edge:8081": f"127.0.0.1:{edge['grpc']}"}) as device,
    ):
        apart = json.loads(curl(ask, device))
    for answer in (whole, apart):
        outputs = {tensor["name"]: tensor["data"] for tensor in answer["outputs"]}
        assert outputs["tiers"] == outputs["exits"]
        assert not any(outputs["partial"])
