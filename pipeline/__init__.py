"""Pixels in, pixels out: the causal student, its caches and its codec. Knows no sockets and no wall clock."""
