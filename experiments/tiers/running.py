"""Tiers in processes of their own, joined by emulated links, and a client that asks them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import numpy as np
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub

from eejax.planning import Link
from eejax.server.commands import started
from experiments.tiers.proxy import Counters, emulated


class Running(NamedTuple):
    """Tiers that run.

    Attributes:
      address: that the client asks.
      pids: of the tiers' processes.
      links: what crossed each.
    """

    address: str
    pids: list[int]
    links: list[Counters]


@contextlib.asynccontextmanager
async def tiers(
    artifact: Path,
    cuts: Sequence[int],
    exits: int,
    codecs: Sequence[str],
    links: Sequence[Link],
    threads: int,
) -> AsyncIterator[Running]:
    """Starts the tiers, the last one first.

    Args:
      artifact: its directory.
      cuts: T - 1, ascending, from 0 to E; a tier without stages is not there, and its links are
        crossed all the same.
      exits: E.
      codecs: of each link.
      links: T - 1, from each tier to the next.
      threads: of each tier.
    """
    bounds = [0, *cuts, exits]
    pids: list[int] = []
    counters: list[Counters] = []
    async with contextlib.AsyncExitStack() as stack:
        address = None
        for tier in reversed(range(len(bounds) - 1)):
            first, end = bounds[tier], bounds[tier + 1]
            if first < end:
                command = [sys.executable, "-m", "eejax.commands", "tier", str(artifact)]
                # One request at a time: no larger tiles need to be measured.
                command += ["--stages", f"{first}:{end}", "--threads", str(threads), "--tile", "4"]
                command += ["--rest-port", "0", "--grpc-port", "0", "--deadline-ms", "60000"]
                # What is asked here are test images in any order; drift is another experiment.
                command += ["--drift-delta", "0"]
                if address is not None:
                    command += ["--next", address, "--codecs", codecs[tier]]
                process, said = await asyncio.to_thread(started, command)
                stack.push_async_callback(_ended, process)
                pids.insert(0, process.pid)
                address = f"127.0.0.1:{said['grpc']}"
            if tier and address is not None:
                link = links[tier - 1]
                address, crossed = await stack.enter_async_context(emulated(link, address, tier))
                counters.insert(0, crossed)
        assert address is not None
        yield Running(address, pids, counters)


async def _ended(process: subprocess.Popen[str]) -> None:
    process.terminate()
    # The links have to go on meanwhile: a tier waits for its connections to close.
    await asyncio.to_thread(process.wait)


class Asked(NamedTuple):
    """What became of n requests, one after the other.

    Attributes:
      seconds: `[n]`.
      labels, exits, tiers: `[n]`; a tier counts from the one that was asked.
      fallbacks: answers in place of a next tier's.
    """

    seconds: np.ndarray
    labels: np.ndarray
    exits: np.ndarray
    tiers: np.ndarray
    fallbacks: int


async def asked(address: str, images: np.ndarray, pause: float) -> Asked:
    """Asks for single images, each some seconds after the answer before."""
    seconds, rows, fallbacks = [], [], 0
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = GRPCInferenceServiceStub(channel)
        for image in images:
            tensor = pb.ModelInferRequest.InferInputTensor(
                name="images", datatype="UINT8", shape=[1, *image.shape]
            )
            request = pb.ModelInferRequest(
                model_name="model", inputs=[tensor], raw_input_contents=[image.tobytes()]
            )
            await asyncio.sleep(pause)
            begin = time.perf_counter()
            response = await stub.ModelInfer(request, timeout=60)
            seconds.append(time.perf_counter() - begin)
            raw = dict(
                zip((t.name for t in response.outputs), response.raw_output_contents, strict=True)
            )
            fallbacks += "fallback" in response.parameters
            rows.append([np.frombuffer(raw[n], np.int32)[0] for n in ("labels", "exits", "tiers")])
    labels, exits, tiers_ = np.array(rows).T
    return Asked(np.array(seconds), labels, exits, tiers_, fallbacks)


def cpu_seconds(pid: int) -> float:
    """What a process has computed so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
