"""Servers for tiers: the Open Inference Protocol over REST and gRPC, and Ray Serve.

Needs the extra `serving`; `eejax.server.ray` needs `ray`. On the command line `eejax serve`, `tier`
and `tiers`; docs/serving.md and docs/tiers.md are the guides.
"""
