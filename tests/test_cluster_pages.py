"""The commands of the page on devices and clusters that run on one machine, in their order."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent / "docs"
# What a reader waits for and a test does not.
SMALL = ["--network.width", "4", "--policies.names", "max_prob", "--inference.repeats", "2"]


def test_the_commands_on_training_run(tmp_path):
    page = (DOCS / "clusters.md").read_text().partition("\n## Comparisons")[0]
    blocks = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    assert len(lines) == 3
    flags = os.environ["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=4", "")
    environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(DOCS.parent)}
    said = ""
    for line in lines:
        assert line.startswith("python -m experiments.")
        command = [sys.executable, *shlex.split(line)[1:]]
        command += SMALL if "experiments.cifar" in line else []
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stderr
        said = done.stdout
    for name in ("many", "two"):
        assert (tmp_path / "runs" / name / "report.html").is_file()
    assert "x one device" in said
