"""The command `eejax`: artifacts on the command line.

`predict`, `inspect` and `verify` need ONNX Runtime and NumPy alone; `export` needs JAX.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from eejax.runtime import manifest

# As in eejax.artifact, which needs JAX.
_LAYERS = ("onnx", "stablehlo", "export")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
      0; 1 if an artifact is not what it should be, or images cannot be read; 2 for a mistake.
    """
    arguments = _parser().parse_args(argv)
    try:
        return arguments.action(arguments)
    except (ValueError, OSError, NotImplementedError, ImportError) as error:
        print(f"eejax: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("eejax: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "eejax", description="Early-exit networks as artifacts: one directory that runs anywhere."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(action: Callable[[Any], int], name: str, about: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=about, description=about)
        added.set_defaults(action=action)
        return added

    export = command(_export, "export", "Write the artifact of a trained network.")
    export.add_argument("run", metavar="RUN", help="directory of a run, or of a bundle")
    export.add_argument("--to", required=True, metavar="DIR", help="directory to write")
    export.add_argument(
        "--layers",
        nargs="+",
        choices=_LAYERS,
        default=_LAYERS,
        help="what to write; each runs without the others; all by default",
    )
    export.add_argument(
        "--drop",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="accuracy that lower thresholds may cost when a server is under load; 0.01 by default",
    )
    export.add_argument(
        "--keep",
        type=int,
        nargs="+",
        metavar="EXIT",
        help="these exits alone, as `inspect` counts them; the last is one of them. Thresholds are "
        "chosen anew on the held-out samples, for the same mean cost",
    )
    verify = command(
        _verify, "verify", "Check every file's hash, and that recorded images get their answers."
    )
    verify.add_argument("directory", metavar="DIR", help="an artifact")
    verify.add_argument("--manifest-sha256", metavar="HASH", help="that its manifest must have")
    verify.add_argument("--jax", action="store_true", help="run the programs for JAX, too")
    verify.add_argument("--threads", type=int, help="by default one for each core")
    inspect = command(_inspect, "inspect", "Say what is in an artifact.")
    inspect.add_argument("directory", metavar="DIR", help="an artifact")
    inspect.add_argument("--json", action="store_true", help="all of it")
    # What they need is imported when they run.
    from eejax.offline import commands as offline
    from eejax.planning import commands as planning
    from eejax.server import commands as server

    offline.add(command)
    server.add(command)
    planning.add(command)
    return parser


def _export(arguments: argparse.Namespace) -> int:
    from eejax.artifact import export
    from eejax.bundle import load
    from eejax.keeping import keep_exits

    start = time.perf_counter()
    bundle = load(arguments.run)
    if arguments.keep is not None:
        bundle = keep_exits(bundle, [exit - 1 for exit in arguments.keep])
    export(bundle, arguments.to, layers=arguments.layers, drop=arguments.drop)
    size = sum(p.stat().st_size for p in Path(arguments.to).rglob("*") if p.is_file())
    seconds = time.perf_counter() - start
    print(f"{arguments.to}: {size / 1e6:.1f} MB in {seconds:.1f} s; eejax verify {arguments.to}")
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    found = manifest.read(arguments.directory)
    if arguments.json:
        print(json.dumps(found.content, indent=1))
        return 0
    content = found.content
    height, width, channels = found.image
    network, policy, certificate = map(found.part, ("network", "policy", "certificate"))
    print(f"{network['family']} {json.dumps(network['arguments'])}")
    print(f"{len(found.classes)} classes: {', '.join(found.classes[:12])}")
    print(f"images uint8 [{height}, {width}, {channels}]")
    print(f"policy {json.dumps(policy['rule'])}")
    print("\nexit   cost   leaves from a score of")
    limits = [f"{t:.4g}" for t in found.thresholds.tolist()] + ["any"]
    for e, (cost, limit) in enumerate(zip(found.costs, limits, strict=True)):
        print(f"{e + 1:>4}  {cost:5.3f}   {limit}")
    print(f"\ncertificate {json.dumps(certificate) if certificate else 'none'}")
    print(f"metadata {json.dumps(found.part('metadata'))}")
    print(f"versions {json.dumps(found.part('versions'))}")
    print(f"manifest sha256 {found.sha256}")
    for name, entry in content["files"].items():
        print(f"{entry['bytes']:>12,}  {name}")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from eejax import runtime

    artifact = runtime.load(arguments.directory, arguments.threads)
    found, layers = artifact.manifest, artifact.manifest.layers
    if arguments.manifest_sha256 not in (None, found.sha256):
        print(f"not the manifest that was expected: {found.sha256}")
        return 1
    for name in found.files:
        found.file(name)
    print(f"{len(found.files)} files have their hashes")
    passed = True
    if "onnx" in layers:
        models = runtime.verify(artifact)
        passed = models.passed
        print(
            f"onnx: {models.images} recorded images, {models.labels} other labels, {models.exits} "
            f"other exits, logits within {models.difference:.1e}"
        )
    for layer in [name for name in layers if name != "onnx"] if arguments.jax else ():
        from eejax.artifact import load

        images, _, exits = runtime.recorded(found)
        other = int((load(arguments.directory, layer).predict(images).exits != exits).sum())
        passed &= not other
        print(f"{layer}: {len(images)} recorded images, {other} other exits")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
