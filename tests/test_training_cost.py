"""What MILO costs in training."""

import importlib.util

import pytest


@pytest.mark.slow
def test_milo_takes_less_than_a_thousandth_of_a_training_step(repository):
    specification = importlib.util.spec_from_file_location("flops", repository / "benchmarks" / "flops.py")
    flops = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(flops)
    counted = flops.count_training_flops(512)
    step = flops.count_flops(512)["UNet + IRControlNet"]
    assert 1.5 * step < counted["standard"] < 3.1 * step  # forward and backward, but for the weights of the frozen UNet
    assert 0 < counted["milo"] - counted["standard"] < 0.001 * counted["standard"]
