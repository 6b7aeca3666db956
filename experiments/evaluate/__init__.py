"""From a trained network to figures."""
