"""Where the jobs of a command run: its flags."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from typing import Literal

from experiments.checks import require, require_not_negative, require_positive


@dataclass(frozen=True)
class SlurmConfig:
    """What a task of SLURM asks for (--backend submitit). --workdir must be shared by the nodes."""

    cluster: Literal["slurm", "local"] = "slurm"
    """local: the same tasks as processes of this machine, to try them out."""
    partition: str | None = None
    """Default: the cluster's."""
    account: str | None = None
    """Who pays."""
    hours: float = 4.0
    """Time limit of a task. One that reaches it is queued again, and its training goes on."""
    memory_gb: float = 8.0
    """Memory of a task."""
    cpus: int = 2
    """Cores of a task."""
    gpus: int = 0
    """GPUs of a task."""
    tasks: int = 256
    """Tasks of an array, at most; if there are more jobs, each task runs several, one after the
    other. SLURM's own limit is MaxArraySize."""


@dataclass(frozen=True)
class RayConfig:
    """Where Ray is and what a job asks it for (--backend ray)."""

    address: str | None = None
    """Of a cluster: "auto" on one of its machines, or HOST:6379. Default: Ray is started on this
    machine alone, for --jobs jobs."""
    cpus: float = 1.0
    """Cores of a job."""
    gpus: float = 0.0
    """GPUs of a job."""
    memory_gb: float = 0.0
    """Memory that must be free for a job; 0: none is reserved."""


@dataclass(frozen=True)
class PoolConfig:
    """Where jobs run."""

    backend: Literal["local", "submitit", "ray"] = "local"
    """local: processes of this machine. submitit: tasks of SLURM. ray: a Ray cluster."""
    jobs: int | None = None
    """Jobs at a time. Default: one a core of this machine, or one where there is an accelerator; on
    a cluster as many as it runs."""
    retries: int = 3
    """How often a job is tried again after its process was killed. A job that raises an exception
    has failed and is not tried again."""
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    ray: RayConfig = field(default_factory=RayConfig)


def check(config: PoolConfig) -> None:
    """Raises ValueError with one line if a value cannot be used."""
    for backend, extra in (("submitit", "cluster"), ("ray", "ray")):
        there = config.backend != backend or importlib.util.find_spec(backend) is not None
        expected = f'it after pip install "eejax[{extra}]", which brings {backend}'
        require(there, "backend", config.backend, expected)
    require(config.jobs is None or config.jobs >= 1, "jobs", config.jobs, "at least 1")
    require_not_negative("", config, "retries")
    require_positive("slurm", config.slurm, "hours memory_gb cpus tasks")
    require_not_negative("slurm", config.slurm, "gpus")
    require_not_negative("ray", config.ray, "cpus gpus memory_gb")
