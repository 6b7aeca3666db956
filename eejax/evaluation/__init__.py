"""Evaluation of a policy on a recorded trace: the reference routing, metrics, significance."""

from eejax.evaluation import metrics, routing, significance
from eejax.evaluation.routing import Routed, Scored, route, score

__all__ = ["Routed", "Scored", "metrics", "route", "routing", "score", "significance"]
