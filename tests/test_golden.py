"""The recorded values in `data` are the reference material's, few, and belong to the weights that are drawn again."""

import sys

import pytest
import torch
from golden import DATA, NETWORKS, golden, official_weights, table

sys.path.insert(0, str(DATA))
import make_golden


def test_the_recorded_values_stay_small():
    assert sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file()) < 6_000_000


@pytest.mark.parametrize("network", NETWORKS)
def test_weights_are_drawn_alike_each_time(network):
    first, second = official_weights(network), official_weights.__wrapped__(network)
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_what_is_stored_is_what_was_recorded(shared):
    source = shared / "diffbir_golden"
    for name in make_golden.KEPT:
        stored, recorded = golden(name), make_golden.pruned(source, name)
        assert stored.keys() == recorded.keys()
        assert all(torch.equal(value, recorded[key]) for key, value in stored.items()), name
    for network, recorded in make_golden.recorded_weights(source).items():
        drawn = official_weights(network)
        assert all(torch.equal(value.float(), drawn[key]) for key, value in recorded.items()), network
    for name, recorded in make_golden.tables(source).items():
        assert table(name) == recorded
