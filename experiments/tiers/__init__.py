"""Device, edge and cloud over emulated links."""
