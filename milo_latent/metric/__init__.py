"""MILO as a metric: the network, and what is computed from its mask."""
