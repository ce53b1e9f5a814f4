"""The shipped weights: cards that tell the truth, small enough, whole, and good at what they are for."""

import hashlib
import json
import re

import pytest
import torch
from diffusers import DiffusionPipeline

from milo_latent import MILO, load_restorer, read_image
from milo_latent.distortions import DISTORTIONS, distort
from milo_latent.evaluation.agreement import spearman
from milo_latent.latents.codec import encode_image
from milo_latent.resources import available_weights, weights_dir
from milo_latent.restoration.restore import restore_image
from milo_latent.testing import generator


@pytest.fixture(scope="module")
def nano():
    restorer = load_restorer("nano", device="cpu")
    restorer.set_progress_bar_config(disable=True)
    return restorer


def psnr(image, clean):
    return -10 * torch.log10((image - clean).square().mean()).item()


def scene():
    """A made scene, (1, 3, 96, 128): a sky, a hill, a wall, all smooth but for their edges."""
    rows, columns = torch.meshgrid(torch.linspace(0, 1, 96), torch.linspace(0, 1, 128), indexing="ij")
    image = torch.stack([0.4 + 0.3 * rows, 0.6 + 0.1 * rows, 0.9 - 0.3 * rows])
    hill = rows > 0.6 + 0.2 * torch.sin(4 * columns)
    image[:, hill] = torch.tensor([[0.25], [0.45], [0.2]])
    image[:, 30:80, 80:110] = torch.tensor([0.75, 0.5, 0.4]).reshape(3, 1, 1)
    return image[None]


def test_every_weight_file_has_its_hash_in_the_card():
    checked = 0
    for name in available_weights():
        card = (weights_dir(name) / "README.md").read_text()
        recorded = dict(re.findall(r"`([\w/.]+\.safetensors)` \| \S+ MB \| `([0-9a-f]{64})`", card))
        files = {str(path.relative_to(weights_dir(name))): path for path in weights_dir(name).rglob("*.safetensors")}
        assert set(recorded) == set(files)
        for relative, path in files.items():
            assert hashlib.sha256(path.read_bytes()).hexdigest() == recorded[relative], relative
            checked += 1
    assert checked >= 5


def test_the_cards_give_commands_data_seeds_and_scores():
    for name in available_weights():
        card = (weights_dir(name) / "README.md").read_text()
        for word in ("python -m milo_latent.training.", "imagenet256", "Seed", "PSNR", "licence"):
            assert word.lower() in card.lower(), word


def test_all_weights_stay_under_40_mb(repository):
    assert sum(path.stat().st_size for path in (repository / "weights").rglob("*") if path.is_file()) < 40e6


def test_no_configuration_holds_a_path(repository):
    for path in (repository / "weights").rglob("*.json"):
        assert "_name_or_path" not in json.loads(path.read_text()), path


def test_nano_restores_noise_clearly(nano):
    clean = scene()
    noisy = (clean + 50 / 255 * torch.randn(clean.shape, generator=generator())).clamp(0, 1)
    restored = restore_image(noisy, model=nano)
    assert psnr(restored, clean) > psnr(noisy, clean) + 8.6


def test_nano_s_metric_sees_more_in_more_noise_and_nothing_in_none(nano):
    clean = scene().repeat(1, 1, 2, 2)
    with torch.no_grad():
        ref = encode_image(nano.vae, clean)
        scores = []
        for sigma in (0, 10, 25, 50):
            noisy = (clean + sigma / 255 * torch.randn(clean.shape, generator=generator())).clamp(0, 1)
            scores.append(nano.metric(dist=encode_image(nano.vae, noisy), ref=ref).item())
    assert scores[0] == 0
    assert scores == sorted(scores)


def test_nano_s_metric_knows_its_latent_space(nano):
    assert nano.metric.config.latent_space == "nano"
    assert nano.metric.config.scaling_factor == nano.vae.config.scaling_factor
    assert torch.equal(MILO.from_pretrained("nano").mask_finder[0].weight, nano.metric.mask_finder[0].weight)


def test_the_shipped_metrics_know_their_spaces_and_see_nothing_in_nothing():
    image, latent = MILO.from_pretrained("milo-image"), MILO.from_pretrained("milo-sd")
    assert (image.config.channels, latent.config.channels) == (3, 4)
    assert (latent.config.latent_space, latent.config.scaling_factor) == ("stable-diffusion", 0.18215)
    for metric in (image, latent):
        ref = torch.rand(1, metric.config.channels, 32, 32, generator=generator())
        noise = torch.randn(ref.shape, generator=generator(1))
        scores = [metric(ref=ref, dist=ref + sigma * noise).item() for sigma in (0, 0.05, 0.1, 0.2)]
        assert scores[0] == 0
        assert scores == sorted(scores)


def test_the_shipped_image_metric_ranks_as_the_official_one(shared):
    ours, official = MILO.from_pretrained("milo-image"), MILO.from_pretrained(shared / "milo_official" / "MILO.pth")
    photos = sorted((shared / "data" / "imagenet256_val").iterdir())[5::25]
    scores = []
    for path in photos:
        ref = read_image(path)[..., :128, :128]
        for kind in list(DISTORTIONS)[::4]:
            for level in (1, 3, 5):
                dist = distort(ref, kind, level, image_id=path.stem)
                scores.append(
                    [metric.compare(ref=ref, dist=dist).error_map.mean().item() for metric in (ours, official)]
                )
    assert spearman(*torch.tensor(scores).T) > 0.95


def test_nano_s_latents_have_a_spread_of_one(nano, shared):
    images = [read_image(path) for path in sorted((shared / "data" / "imagenet256_val").iterdir())[:10]]
    with torch.no_grad():
        spread = encode_image(nano.vae, torch.cat(images)).std().item()
    assert spread == pytest.approx(1.0, abs=0.15)


def test_the_vae_reaches_what_its_card_says(nano, shared):
    from milo_latent.training.train_autoencoder import reconstruction_psnr

    card = (weights_dir("nano") / "README.md").read_text()
    said = float(re.search(r"mean PSNR on `imagenet256_val`: (\d+\.\d+) dB", card).group(1))
    measured = reconstruction_psnr(nano.vae, shared / "data" / "imagenet256_val")
    assert measured == pytest.approx(said, abs=0.02)
    assert measured >= 23.2


def test_nano_loads_without_this_package_s_own_class(nano, repository):
    pipeline = DiffusionPipeline.from_pretrained(
        weights_dir("nano"), custom_pipeline=str(repository / "pipelines" / "diffbir.py"), trust_remote_code=True
    )
    assert type(pipeline).__name__ == "DiffBIRPipeline"


def test_the_borders_of_photos_of_any_size_are_as_clean_as_the_middle(nano):
    """Padding that repeats the border turns its noise into streaks, which a cleaner takes for edges."""
    noisy = (0.5 + 50 / 255 * torch.randn(1, 3, 77, 93, generator=generator())).clamp(0, 1)
    error = (restore_image(noisy, model=nano, stage="cleaner") - 0.5).abs().mean(dim=(0, 1))
    middle = error[16:-16, 16:-16].mean()
    assert error[:, -2:].mean() < 2.5 * middle
    assert error[-2:].mean() < 2.5 * middle
