"""Data sets as arrays in memory, cut into splits of one use each."""
