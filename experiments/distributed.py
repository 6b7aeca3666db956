"""A training in several processes: starting them, what they agree on, how they end together.

Everything between the processes is JAX's own runtime (`jax.distributed`): each process runs the
same program on its own devices, and the first one also writes reports. A process that dies ends
the others: at once, where `start` started them or a collective notices; otherwise after
`HEARTBEAT` seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from eejax.training.placement import make_mesh
from experiments.checks import require, require_positive

# Seconds after which a process that no longer answers counts as dead; JAX then ends the others.
HEARTBEAT = 30
# Seconds for processes to end by themselves after one of them has ended with an error or a signal.
GRACE, SAVING = 5.0, 300.0
# How a started process learns its number, and of the end of the process that started it.
_PLACE, _LIFELINE = "EEJAX_PROCESS", "EEJAX_LIFELINE"


@dataclass(frozen=True)
class DistributedConfig:
    """The devices and processes of a training. A run can be resumed with any others."""

    processes: int = 1
    """Processes to start on this machine for one training."""
    devices: int | None = None
    """Devices that each process uses; a CPU simulates as many. Default: all it has; with
    processes, one GPU for each."""
    fsdp: int = 1
    """Devices that divide parameters and optimiser state among them (fully sharded); 1 for none."""
    cluster: bool = False
    """This command is one process of many, started by SLURM, Kubernetes, Open MPI or on each host
    of a TPU pod, which JAX detects."""


def check(config: DistributedConfig) -> None:
    """Raises ValueError if a value cannot be used."""
    require_positive("distributed", config, "processes devices fsdp")
    usable = not (config.cluster and config.processes > 1)
    expected = "1 with --distributed.cluster, which starts the processes itself"
    require(usable, "distributed.processes", config.processes, expected)


def to_start(config: DistributedConfig) -> bool:
    """Whether this process is to start the processes of the run, and is none of them."""
    return config.processes > 1 and _PLACE not in os.environ


def join(config: DistributedConfig) -> None:
    """Makes this process one of its run's; it returns when all are there.

    To be called before JAX looks for devices.

    Raises:
      ValueError: if no cluster is detected.
    """
    if config.devices is not None:
        with contextlib.suppress(RuntimeError):  # devices exist already: `mesh` counts them
            jax.config.update("jax_num_cpu_devices", config.devices)
    if _LIFELINE in os.environ:
        _end_with_the_starter()
    if place := os.environ.get(_PLACE):
        jax.distributed.initialize(**json.loads(place), heartbeat_timeout_seconds=HEARTBEAT)
    elif config.cluster:
        try:
            jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT)
        except (ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"--distributed.cluster: JAX finds no cluster here ({reason}); docs/clusters.md "
                "has a command for each kind."
            ) from error


def mesh(config: DistributedConfig) -> Mesh:
    """The mesh of the run: the first devices of every process.

    Raises:
      ValueError: if a process has fewer devices, or `fsdp` does not divide their number.
    """
    devices = []
    for process in range(jax.process_count()):
        local = jax.local_devices(process)
        count = len(local) if config.devices is None else config.devices
        expected = f"at most {len(local)}, the devices of process {process}"
        require(count <= len(local), "distributed.devices", count, expected)
        devices += local[:count]
    expected = f"a divisor of {len(devices)}, the devices of all processes"
    require(len(devices) % config.fsdp == 0, "distributed.fsdp", config.fsdp, expected)
    return make_mesh(devices, config.fsdp)


def first() -> bool:
    """Whether this is the process that writes reports."""
    return jax.process_index() == 0


def agreed(values: Sequence[int]) -> np.ndarray:
    """What every process gives, int32 `[P, n]`; all processes call it at the same point."""
    if jax.process_count() == 1:
        return np.asarray([values], np.int32)
    return multihost_utils.process_allgather(np.asarray(values, np.int32))


def shared(text: str) -> str:
    """The text of the first process, at most 4,096 bytes of UTF-8."""
    if jax.process_count() == 1:
        return text
    padded = np.zeros(4096, np.uint8)
    encoded = np.frombuffer(text.encode(), np.uint8)
    padded[: len(encoded)] = encoded
    return bytes(multihost_utils.broadcast_one_to_all(padded)).rstrip(b"\0").decode()


def leave() -> None:
    """Ends the connection between the processes, when all are done with the devices of the others.

    The first process may go on alone, on its own devices, as long as it likes.
    """
    if jax.process_count() > 1:
        jax.distributed.shutdown()


@contextlib.contextmanager
def ending_together(common: tuple[type[BaseException], ...]) -> Iterator[None]:
    """Ends this process of many at once after an exception, which the others learn by that.

    Leaving Python in the ordinary way would wait for the others, which wait for this process.

    Args:
      common: exceptions that all processes raise at the same point. In the first one they pass; the
        others end without a word, with the exception's `code`, or 1.
    """
    try:
        yield
    except common as error:
        if not first():
            raise SystemExit(getattr(error, "code", 1)) from error
        raise
    except Exception:
        if jax.process_count() == 1:
            raise
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def launch(
    command: Sequence[str], config: DistributedConfig, **options: Any
) -> list[subprocess.Popen[Any]]:
    """Starts the processes of a run on this machine; each is to call `join`.

    They end when this process ends, however it does.

    Args:
      command: and its arguments, the same for all.
      config: how many processes, and GPUs for each.
      options: for `subprocess.Popen`.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    # Its other end stays open as long as this process lives.
    lifeline, _ = os.pipe()
    devices = config.devices or 1
    processes = []
    for i in range(config.processes):
        environment = {**os.environ, _LIFELINE: str(lifeline)}
        place = {
            "coordinator_address": address,
            "coordinator_bind_address": address,
            "num_processes": config.processes,
            "process_id": i,
            "local_device_ids": list(range(i * devices, (i + 1) * devices)),
        }
        if config.processes > 1:
            environment[_PLACE] = json.dumps(place)
        processes.append(
            subprocess.Popen(
                command,
                env=environment,
                pass_fds=(lifeline,),
                start_new_session=True,  # Ctrl-C comes to this process alone
                **options,
            )
        )
    os.close(lifeline)
    return processes


def start(module: str, argv: Sequence[str], config: DistributedConfig) -> int:
    """Runs `python -m module argv` in several processes of this machine, as one training.

    SIGTERM and SIGINT are passed on. If a process dies, the others are killed at once.

    Returns:
      The exit status: 0; of the first process that failed; or 128 + n after signal n.
    """
    command = [sys.executable, "-m", module, *argv]
    processes = launch(command, config, stdin=subprocess.DEVNULL)

    def forward(number: int, frame: Any) -> None:
        del frame
        for process in processes:
            process.send_signal(number)

    numbers = signal.SIGTERM, signal.SIGINT
    before = {number: signal.signal(number, forward) for number in numbers}
    try:
        return _wait(processes)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(processes: Sequence[subprocess.Popen[Any]]) -> int:
    """Until all have ended, or the time for that is over after one has failed."""
    failed, deadline = None, float("inf")
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        if failed is None:
            failed = next((i for i, p in enumerate(processes) if p.poll()), None)
            if failed is not None:
                code = processes[failed].returncode
                # A status above 128 is that of a run that saves and ends: all processes do.
                deadline = time.monotonic() + (0 if code < 0 else SAVING if code > 128 else GRACE)
        time.sleep(0.02)
    if failed is None:
        failed = next((i for i, p in enumerate(processes) if p.poll()), None)
    if failed is None:
        return 0
    code = processes[failed].returncode
    if code >= 0:
        return code
    print(
        f"process {failed} of {len(processes)} was ended by {signal.Signals(-code).name}, and the "
        "others with it; the same command with --workdir and --resume continues from the last "
        "checkpoint",
        file=sys.stderr,
    )
    return 128 - code


def _end_with_the_starter() -> None:
    """Ends this process when the starter ends, which closes the lifeline."""
    lifeline = int(os.environ[_LIFELINE])

    def watch() -> None:
        with contextlib.suppress(OSError):
            os.read(lifeline, 1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
