"""The tutorials and how-to pages: their Python blocks run as printed, one after the other."""

import re

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

from milo_latent import MILO
from milo_latent.testing import generator

PAGES = ["tutorials/restore_photos", "tutorials/guide_a_pipeline", "tutorials/compare_images", "howto/large_photos"]
PAGES += ["howto/few_steps", "tutorials/train_a_metric"]


def tiny_stable_diffusion():
    """Return the class of the page with tiny random networks and no text encoder, which takes any prompt."""
    torch.manual_seed(0)
    shape = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    vae = AutoencoderKL(
        block_out_channels=(8,) * 4, down_block_types=("DownEncoderBlock2D",) * 4, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4,
    )  # fmt: skip
    torch.nn.init.normal_(vae.quant_conv.weight, std=10.0)  # for scaled latents with a spread of about 1
    unet = UNet2DConditionModel(
        **shape, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), sample_size=64, attention_head_dim=4,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=8,
    )  # fmt: skip
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=True)

    class Pipeline(diffusers.StableDiffusionImg2ImgPipeline):
        def encode_prompt(self, *args, **kwargs):
            embeds = torch.randn(1, 5, 8, generator=generator(3))
            return embeds, -embeds

    parts = {"vae": vae, "unet": unet, "scheduler": scheduler, "text_encoder": None, "tokenizer": None}
    pipe = Pipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("page", PAGES)
def test_the_python_blocks_run(page, repository, monkeypatch, tmp_path):
    (tmp_path / "examples").symlink_to(repository / "examples")
    monkeypatch.chdir(tmp_path)
    loader = "diffusers.StableDiffusionImg2ImgPipeline.from_pretrained"
    monkeypatch.setattr(loader, lambda name: tiny_stable_diffusion())
    MILO.from_pretrained("nano").save_pretrained(tmp_path / "runs" / "metric" / "metric")
    blocks = re.findall(r"```python\n(.*?)```", (repository / "docs" / f"{page}.md").read_text(), re.S)
    assert blocks
    names = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    if page == "tutorials/guide_a_pipeline":
        free, guided, pulled = (torch.tensor(list(names[name].getdata())) for name in ("free", "guided", "pulled"))
        assert not torch.equal(free, guided)
        assert not torch.equal(free, pulled)
        assert len(names["guide"].trace) == 8  # of ten steps, at a strength of 0.8
