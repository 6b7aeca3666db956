"""The commands `eejax serve`, `eejax tier` and `eejax tiers`."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from eejax.runtime import manifest
from eejax.tiers.codec import CODECS

if TYPE_CHECKING:
    from eejax.server.security import Tls
    from eejax.server.serve import Options
    from eejax.server.upstream import Link

Command = Callable[[Callable[[Any], int], str, str], argparse.ArgumentParser]
_INSTALL = 'serving needs more packages: pip install "eejax[serving]"'


def add(command: Command) -> None:
    """Adds the commands.

    Args:
      command: `command(action, name, about)` makes the parser of a command.
    """
    serve = command(
        _serve,
        "serve",
        "Serve an artifact by the Open Inference Protocol (V2), over REST and gRPC.",
    )
    _common(serve)
    tier = command(
        _serve,
        "tier",
        "Serve some stages of an artifact, and send what they are not sure of to the next tier.",
    )
    _common(tier)
    tier.add_argument(
        "--stages", type=_span, required=True, metavar="FIRST:END", help="as in 0:2; from 0"
    )
    tier.add_argument("--next", metavar="HOST:PORT", help="gRPC address of the next tier")
    tier.add_argument(
        "--codecs",
        nargs="+",
        choices=CODECS,
        default=["bfloat16", "float32"],
        help="for features, the most wanted first; the next tier takes the first that it knows; "
        "bfloat16 by default",
    )
    tier.add_argument("--next-name", default="model", metavar="NAME", help="of the model there")
    tier.add_argument("--next-token", type=Path, metavar="FILE", help="a bearer token for it")
    tier.add_argument("--next-ca", type=Path, metavar="PEM", help="who signs its certificate")
    tier.add_argument("--next-cert", type=Path, metavar="PEM", help="this tier's, for mTLS")
    tier.add_argument("--next-key", type=Path, metavar="PEM", help="of --next-cert")
    tiers = command(
        _tiers,
        "tiers",
        "Run a network as tiers on this machine, each a process, until it is interrupted.",
    )
    tiers.add_argument("directory", type=Path, metavar="DIR", help="an artifact")
    tiers.add_argument(
        "--cut", type=int, nargs="+", required=True, metavar="STAGE", help="a tier ends before it"
    )
    tiers.add_argument("--codecs", nargs="+", choices=CODECS, default=["bfloat16"])
    _thresholds(tiers)
    _ports(tiers)


def _ports(parser: argparse.ArgumentParser) -> None:
    port = {"type": _port, "metavar": "PORT"}
    parser.add_argument("--rest-port", default=8080, help="8080 by default; 0 for any", **port)
    parser.add_argument("--grpc-port", default=8081, help="8081 by default; 0 for any", **port)


def _thresholds(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--thresholds",
        type=lambda text: tuple(map(float, text.split(","))),
        metavar="T,...",
        help="instead of the artifact's, as in --thresholds=-inf,0.5; inf switches an exit off",
    )


def _common(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("directory", type=Path, metavar="DIR", help="an artifact")
    add("--name", default="model", help="of the model in requests; model by default")
    add("--host", default="127.0.0.1", help="where to listen; 127.0.0.1 by default")
    _ports(parser)
    _thresholds(parser)
    add("--tile", type=_positive, default=64, help="samples that run together; 64 by default")
    add("--threads", type=_positive, help="of ONNX Runtime; by default one for each core")
    add(
        "--deadline-ms",
        type=float,
        default=1000.0,
        metavar="MS",
        help="the longest deadline, and that of requests without one; 1000 by default",
    )
    add("--batch", type=_positive, default=64, help="images in a request; 64 at most by default")
    add("--message-bytes", type=_positive, default=8 << 20, metavar="N", help="in a request")
    add("--requests", type=_positive, default=1024, metavar="N", help="under way at most")
    add("--connections", type=_positive, default=1000, metavar="N", help="open at most")
    add("--drain-seconds", type=float, default=20.0, metavar="S", help="after SIGTERM")
    add(
        "--drift-delta",
        type=float,
        default=0.01,
        metavar="P",
        help="probability of a false alarm of drift, ever; after an alarm every image goes to the "
        "last exit; 0 to watch for none; 0.01 by default",
    )
    add("--token", type=Path, metavar="FILE", help="bearer tokens, one a line; mode 600")
    add("--cert", type=Path, metavar="PEM", help="certificate, for TLS")
    add("--key", type=Path, metavar="PEM", help="its key")
    add("--client-ca", type=Path, metavar="PEM", help="who signs clients' certificates, for mTLS")


def _span(text: str) -> tuple[int, int]:
    first, _, end = text.partition(":")
    return int(first), int(end)


def _port(text: str) -> int:
    number = int(text)
    if not 0 <= number < 1 << 16:
        raise ValueError
    return number


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def _serve(arguments: argparse.Namespace) -> int:
    # In this order: what is wrong with the artifact matters more than what is not installed.
    manifest.read(arguments.directory)
    # gRPC's own remarks, such as that a connection was idle, are no lines of JSON.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    try:
        from eejax.server.serve import serve
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{_INSTALL} ({error})") from error
    try:
        asyncio.run(serve(_options(arguments)))
    except KeyboardInterrupt:  # while it measured
        return 130
    return 0


def _options(arguments: argparse.Namespace) -> Options:
    from eejax.server.security import Limits, read_tokens
    from eejax.server.serve import Options

    limits = Limits(
        batch=arguments.batch,
        message=arguments.message_bytes,
        requests=arguments.requests,
        connections=arguments.connections,
        seconds=1e-3 * arguments.deadline_ms,
        draining=arguments.drain_seconds,
    )
    if not (0 < limits.seconds < 1e6 and 0 < limits.draining < 1e6):
        raise ValueError(
            f"--deadline-ms {arguments.deadline_ms}, --drain-seconds {arguments.drain_seconds}; "
            "give positive numbers."
        )
    if limits.batch > limits.requests:
        raise ValueError(
            f"--batch {limits.batch} images and --requests {limits.requests}; each image takes a "
            "place, so give no more of them than there are places."
        )
    return Options(
        artifact=arguments.directory,
        limits=limits,
        name=arguments.name,
        host=arguments.host,
        rest=arguments.rest_port,
        grpc=arguments.grpc_port,
        stages=getattr(arguments, "stages", None),
        link=_link(arguments) if getattr(arguments, "next", None) else None,
        thresholds=arguments.thresholds,
        tile=arguments.tile,
        threads=arguments.threads,
        delta=arguments.drift_delta,
        tls=_tls(arguments),
        tokens=read_tokens(arguments.token) if arguments.token else None,
    )


def _tls(arguments: argparse.Namespace) -> Tls | None:
    from eejax.server.security import Tls

    given = (arguments.cert, arguments.key)
    if not any((*given, arguments.client_ca)):
        return None
    if None in given:
        raise ValueError("TLS needs --cert and --key, and --client-ca only with them.")
    return Tls(*given, arguments.client_ca)


def _link(arguments: argparse.Namespace) -> Link:
    import grpc

    from eejax.server.upstream import Link

    pair = (arguments.next_key, arguments.next_cert)
    if (pair[0] is None) != (pair[1] is None) or (any(pair) and arguments.next_ca is None):
        raise ValueError("mTLS needs --next-ca, --next-cert and --next-key.")
    credentials = token = None
    if arguments.next_ca is not None:
        files = (None if path is None else path.read_bytes() for path in (*pair,))
        credentials = grpc.ssl_channel_credentials(arguments.next_ca.read_bytes(), *files)
    if arguments.next_token is not None:
        token = arguments.next_token.read_text().strip()
    return Link(arguments.next, arguments.next_name, tuple(arguments.codecs), credentials, token)


def _tiers(arguments: argparse.Namespace) -> int:
    exits = manifest.read(arguments.directory).num_exits
    bounds = [0, *arguments.cut, exits]
    if sorted(set(bounds)) != bounds:
        raise ValueError(f"cuts {arguments.cut} of {exits} stages; give ascending ones inside.")
    spans = list(itertools.pairwise(bounds))
    processes: list[subprocess.Popen[str]] = []
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        address = None
        for first, end in reversed(spans):
            ports = [arguments.rest_port, arguments.grpc_port] if first == 0 else [0, 0]
            command = [sys.executable, "-m", "eejax.commands", "tier", str(arguments.directory)]
            command += ["--stages", f"{first}:{end}", "--codecs", *arguments.codecs]
            command += ["--rest-port", str(ports[0]), "--grpc-port", str(ports[1])]
            command += ["--next", address] if address else []
            if arguments.thresholds is not None:
                command += [f"--thresholds={','.join(map(str, arguments.thresholds))}"]
            process, said = started(command, processes.append)
            if stop.is_set():
                return 130
            address = f"{said['host']}:{said['grpc']}"
            print(
                f"stages {first}:{end}  process {process.pid}  REST {said['host']}:{said['rest']}  "
                f"gRPC {address}",
                flush=True,
            )
        print("requests go to the last of them; Ctrl-C ends all", flush=True)
        _until_stopped(stop, processes)
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            process.wait()
    return 0


def started(
    command: Sequence[str], keep: Callable[[subprocess.Popen[str]], Any] = lambda process: None
) -> tuple[subprocess.Popen[str], dict[str, Any]]:
    """A server in a process of its own, and what it said when it was ready to serve.

    Its log goes on to this process's stderr.

    Args:
      command: that serves.
      keep: called with the process before it is ready.

    Raises:
      ValueError: if it ends before; its last words are in the text.
    """
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    keep(process)
    assert process.stderr is not None
    last = ""
    for line in process.stderr:
        last = line.strip() or last
        try:
            said = json.loads(line)
        except ValueError:
            continue
        if said.get("event") == "serving":
            threading.Thread(target=_passed_on, args=(process.stderr,), daemon=True).start()
            return process, said
    process.stderr.close()
    process.wait()
    raise ValueError(f"a tier ended with status {process.returncode}: {last}")


def _passed_on(lines: TextIO) -> None:
    with lines:
        for line in lines:
            sys.stderr.write(line)


def _until_stopped(stop: threading.Event, processes: Sequence[subprocess.Popen[str]]) -> None:
    """Waits until it is to stop, or all tiers have ended by themselves."""
    gone: set[int] = set()
    while not stop.wait(0.2):
        for process in processes:
            if process.poll() is not None and process.pid not in gone:
                gone.add(process.pid)
                print(f"process {process.pid} ended with {process.returncode}", flush=True)
        if len(gone) == len(processes):
            return
