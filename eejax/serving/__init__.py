"""Serving under load and deadlines."""

from eejax.serving.scheduler import Answer, Level, Refusal, Scheduler
from eejax.serving.service import Service
from eejax.serving.times import StageTimes, measure

__all__ = ["Answer", "Level", "Refusal", "Scheduler", "Service", "StageTimes", "measure"]
