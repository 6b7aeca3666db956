"""Networks with early exits from existing models, cut at named values."""

from eejax.adapters.linen import cut_linen
from eejax.adapters.nnx import cut_nnx, nnx_variables, update_nnx

__all__ = ["cut_linen", "cut_nnx", "nnx_variables", "update_nnx"]
