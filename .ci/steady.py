"""A server at steady load for some minutes: its memory has to be flat.

    python .ci/steady.py artifact --minutes 10 --rate 100

Requests of one image come at random moments (Poisson) over gRPC and REST in turn, some of them
malformed, some given up by their client. Memory is read every ten seconds. It is flat if the median
of the last third is no more than 5 % above that of the second; the first third is for caches.
"""

import argparse
import asyncio
import contextlib
import os
import random
import sys
import time
from pathlib import Path

import grpc
import numpy as np

from eejax.runtime import read
from eejax.server.commands import started
from tests.servers import INFER, ask, message, request, stub


async def load(said, image, seconds, rate, pid):
    draw, tasks, counts, sizes = random.Random(0), set(), {}, []
    begin = time.monotonic()
    next_size = begin

    async def one(number):
        kind = draw.random()
        if kind < 0.05:
            reply = await ask(said["rest"], INFER, b"{" * 100)
            return reply.status
        if kind < 0.1:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(client.ModelInfer(message(image)), 0.001)
            return "given up"
        if kind < 0.3:
            return (await ask(said["rest"], INFER, request(image))).status
        try:
            await client.ModelInfer(message(image), timeout=30)
            return "answered"
        except grpc.aio.AioRpcError as error:
            return error.code().name

    async with stub(said["grpc"]) as client:
        number = 0
        while (now := time.monotonic()) < begin + seconds:
            if now >= next_size:
                pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
                sizes.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
                print(f"{now - begin:6.0f} s  {sizes[-1]:7.1f} MiB  {counts}", flush=True)
                next_size += 10
            await asyncio.sleep(draw.expovariate(rate))
            task = asyncio.create_task(one(number))
            number += 1
            tasks.add(task)
            if len(tasks) > 200:
                done = {task for task in tasks if task.done()}
                for task in done:
                    counts[task.result()] = counts.get(task.result(), 0) + 1
                tasks -= done
        await asyncio.gather(*tasks)
    return sizes


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--rate", type=float, default=100.0)
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "eejax.commands", "serve", str(arguments.artifact)]
    process, said = started([*command, "--rest-port", "0", "--grpc-port", "0"])
    try:
        sides = read(arguments.artifact).image
        image = np.random.default_rng(0).integers(0, 256, (1, *sides), np.uint8)
        sizes = asyncio.run(load(said, image, 60 * arguments.minutes, arguments.rate, process.pid))
    finally:
        process.terminate()
        process.wait()
    third = max(len(sizes) // 3, 1)
    before, after = (float(np.median(sizes[k * third : (k + 1) * third])) for k in (1, 2))
    print(f"median of the second third {before:.1f} MiB, of the last {after:.1f} MiB")
    return int(after > 1.05 * before)


if __name__ == "__main__":
    sys.exit(main())
