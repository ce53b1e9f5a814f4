"""Several files at once in the threads of one process: results are those of one after another."""

import threading
import warnings

import pytest
import torch

from milo_latent.files import read_image, write_image
from milo_latent.jobs import find_jobs
from milo_latent.latents.files import encode_files
from milo_latent.score.pairs import match_pairs, score_pairs
from milo_latent.testing import tiny_metric, tiny_pipeline
from milo_latent.threads import LARGE, alone_if_large, in_threads, thread_count

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _two_cores(set_threads):
    """Compute on two cores, whatever this machine has."""
    set_threads(2)


def results(work, items, **options):
    return [(item, outcome()) for item, outcome in in_threads(work, items, **options)]


def test_results_come_in_the_order_of_the_items_and_are_made_at_once():
    both = threading.Barrier(2, timeout=30)  # of which neither passes alone

    def work(item):
        if item < 2:
            both.wait()
        return item * 10

    assert results(work, iter(range(7)), threads=2) == [(item, item * 10) for item in range(7)]
    assert results(lambda item: item, [], threads=2) == []


def test_a_thread_computes_on_one_core_and_the_caller_on_all_again():
    assert [cores for _, cores in results(lambda _: torch.get_num_threads(), range(3), threads=2)] == [1, 1, 1]
    assert torch.get_num_threads() == 2
    assert [cores for _, cores in results(lambda _: torch.get_num_threads(), range(3), threads=1)] == [2, 2, 2]


def test_one_large_image_at_a_time_is_computed_on_all_cores():
    within, most = [], []

    def work(pixels):
        with alone_if_large(pixels):
            within.append(pixels)
            most.append(sum(each > LARGE for each in within))
            cores = torch.get_num_threads()
            within.remove(pixels)
        return cores, torch.get_num_threads()

    found = results(work, [LARGE + 1, LARGE, LARGE + 1, LARGE + 1], threads=2)
    assert [cores for _, cores in found] == [(2, 1), (1, 1), (2, 1), (2, 1)]
    assert max(most) == 1
    with alone_if_large(LARGE + 1):  # outside a pool nothing is to be done
        assert torch.get_num_threads() == 2


def test_an_error_costs_its_item_only_and_one_that_is_not_taken_ends_the_pool():
    def work(item):
        if item == 1:
            raise ValueError("one")
        return item

    outcomes = [outcome for _, outcome in in_threads(work, range(4), threads=2)]
    with pytest.raises(ValueError, match="one"):
        outcomes[1]()
    assert [outcomes[index]() for index in (0, 2, 3)] == [0, 2, 3]
    begun = []
    with pytest.raises(ValueError, match="one"):
        results(lambda item: begun.append(item) or work(item), range(1000), threads=2)
    assert len(begun) < 10
    assert torch.get_num_threads() == 2


def test_no_more_items_wait_than_twice_the_threads():
    taken = []
    items = (taken.append(index) or index for index in range(100))
    running = in_threads(lambda item: item, items, threads=2)
    next(running)
    assert len(taken) == 4
    running.close()


def test_as_many_threads_as_cores_but_few():
    assert thread_count(CPU) == 2
    torch.set_num_threads(64)
    assert thread_count(CPU) == 4
    assert thread_count(torch.device("cuda")) == 2


@pytest.fixture
def photos(tmp_path):
    rng = torch.Generator().manual_seed(0)
    (tmp_path / "photos").mkdir()
    for index in range(20):
        write_image(tmp_path / "photos" / f"{index:02}.png", torch.rand(1, 3, 40, 48, generator=rng))
    (tmp_path / "photos" / "07.png").write_text("no image")
    return tmp_path / "photos"


def test_files_encoded_at_once_are_those_encoded_one_by_one(photos, tmp_path):
    vae = tiny_pipeline().vae
    torch.set_num_threads(1)
    reports = {}
    for cores in (1, 2):
        torch.set_num_threads(cores)
        jobs = find_jobs([photos], f"{tmp_path / str(cores)}/", suffixes=frozenset({".png"}), suffix=".npy")
        reports[cores] = encode_files(vae, jobs, vae_name="tiny", progress=False)
    assert list(reports[1].failed) == list(reports[2].failed) == [photos / "07.png"]
    assert list(reports[2].made) == sorted(reports[2].made)
    assert len(reports[2].made) == 19
    for each in (tmp_path / "1").iterdir():
        assert each.read_bytes() == (tmp_path / "2" / each.name).read_bytes()


def test_pairs_scored_at_once_are_those_scored_one_batch_after_another(photos):
    metric = tiny_metric(channels=3)
    for ref in (photos, photos / "03.png"):  # by names, and one reference for all
        pairs, tables = match_pairs(ref, photos) * 3, []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            failed = []
            rows = list(score_pairs(metric, pairs, failed=failed, threads=threads))
            tables.append((rows, failed))
        assert tables[0] == tables[1]
        assert len(tables[0][0]) == 57
        assert len(tables[0][1]) == 1
        assert ref == photos or len({row.error for row in tables[0][0]}) == 19


def test_an_unreadable_reference_is_told_once(photos):
    failed = []
    pairs = match_pairs(photos / "07.png", photos) * 2
    assert list(score_pairs(tiny_metric(channels=3), pairs, failed=failed, threads=2)) == []
    assert len(failed) == 1


def test_reading_in_threads_leaves_the_warnings_as_they_were(photos):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = list(warnings.filters)
        results(read_image, [photos / f"{index:02}.png" for index in (0, 1, 2, 3, 4, 5)] * 8, threads=2)
        assert warnings.filters == before
