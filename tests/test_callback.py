"""Guidance through `callback_on_step_end` and `attach`: in every step, exactly, without decoding, gone afterwards."""

import copy
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    IPNDMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.stable_diffusion import StableDiffusionPipeline

from milo_latent import MILOGuidance
from milo_latent.guidance.x0 import guide_model_output
from milo_latent.latents.codec import encode_image, pad_image
from milo_latent.testing import generator, latent_pair, tiny_metric, tiny_pipeline


def run(pipeline, callback=None, *, steps=4, seed=0, **options):
    image = torch.rand(1, 3, 50, 70, generator=generator(5))
    options = {"num_inference_steps": steps, "output_type": "latent"} | options
    return pipeline(image=image, generator=generator(seed), callback_on_step_end=callback, **options).images


def reference_latents(pipeline):
    image = torch.rand(1, 3, 50, 70, generator=generator(5))
    with torch.no_grad():
        return encode_image(pipeline.vae, pad_image(pipeline.clean(image), 16, smallest=128))


@pytest.fixture
def stock():
    """A text-to-image pipeline of tiny random networks, its prompt given as embeddings."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    tiny = tiny_pipeline()
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    text = CLIPTextConfig(hidden_size=8, intermediate_size=8, num_attention_heads=2, num_hidden_layers=1, vocab_size=10)
    pipeline = StableDiffusionPipeline(
        vae=tiny.vae, text_encoder=CLIPTextModel(text), tokenizer=None, unet=unet, scheduler=tiny.scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run_stock(pipeline, callback=None, steps=4, guidance_scale=3.0):
    embeds = torch.randn(1, 5, 8, generator=generator(3))
    return pipeline(
        prompt_embeds=embeds, negative_prompt_embeds=-embeds, num_inference_steps=steps, height=128, width=128,
        guidance_scale=guidance_scale, generator=generator(), output_type="latent", callback_on_step_end=callback,
    ).images  # fmt: skip


def test_scale_zero_changes_no_bit(pipeline, metric):
    assert torch.equal(run(pipeline), run(pipeline, MILOGuidance(metric, milo_scale=0.0)))


@pytest.mark.parametrize(
    "scheduler", [DDIMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler, UniPCMultistepScheduler]
)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_full_strength_with_equal_weights_ends_at_the_reference(metric, scheduler, prediction_type):
    pipeline = tiny_pipeline(prediction_type=prediction_type)
    options = {"set_alpha_to_one": True} if scheduler is DDIMScheduler else {}
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, **options)
    restored = run(pipeline, MILOGuidance(metric, milo_scale=1.0, schedule="constant"))
    assert torch.allclose(restored, reference_latents(pipeline), atol=1e-4)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_guidance_moves_the_result_towards_the_reference(pipeline, metric, schedule):
    reference = reference_latents(pipeline)
    distances = [
        (run(pipeline, MILOGuidance(metric, milo_scale=scale, schedule=schedule)) - reference).abs().mean()
        for scale in (0.0, 0.3, 0.8)
    ]
    assert distances[0] > distances[1] > distances[2]


def test_nothing_is_decoded_on_the_way(pipeline, metric, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("decoded while sampling")

    monkeypatch.setattr(pipeline.vae, "decode", refuse)
    run(pipeline, MILOGuidance(metric))


def test_outside_its_interval_guidance_changes_nothing(pipeline, metric):
    guide = MILOGuidance(metric, start=0.9, stop=0.95)  # between the third and the last of four steps
    assert torch.equal(run(pipeline), run(pipeline, guide))
    late, always = MILOGuidance(metric, start=0.5), MILOGuidance(metric)
    assert not torch.equal(run(pipeline), run(pipeline, late))
    assert not torch.equal(run(pipeline, always), run(pipeline, late))


def test_a_batch_is_guided_as_its_images_alone(pipeline, metric):
    images = torch.rand(2, 3, 40, 40, generator=generator(7))
    options = {"num_inference_steps": 3, "output_type": "latent", "callback_on_step_end": MILOGuidance(metric)}
    batch = pipeline(image=images, generator=[generator(1), generator(2)], **options).images
    for index, seed in ((0, 1), (1, 2)):
        alone = pipeline(image=images[index : index + 1], generator=generator(seed), **options).images
        assert torch.allclose(batch[index : index + 1], alone, atol=1e-4)


def test_two_runs_do_not_influence_each_other(pipeline, metric):
    guide = MILOGuidance(metric)
    first = run(pipeline, guide)
    assert torch.equal(run(pipeline, guide), first)


def test_it_composes_with_other_callbacks(pipeline, metric):
    class Count(PipelineCallback):
        tensor_inputs = ("latents",)
        seen = 0

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            self.seen += 1
            return callback_kwargs

    count = Count()
    count.tensor_inputs = ["latents"]
    together = run(pipeline, MultiPipelineCallbacks([MILOGuidance(metric), count]))
    assert count.seen == 4
    assert torch.equal(together, run(pipeline, MILOGuidance(metric)))


class Pull:
    """A guide that derives from nothing."""

    def __init__(self, fraction):
        self.fraction, self.calls = fraction, []

    def start(self, reference, num_steps):
        self.reference, self.num_steps = reference, num_steps

    def __call__(self, x0, *, progress, timestep):
        self.calls.append((progress, timestep))
        return x0 + self.fraction * (self.reference - x0) if self.fraction else x0


def test_any_object_with_start_and_call_guides(pipeline):
    pull = Pull(1.0)
    assert torch.allclose(run(pipeline, pull), reference_latents(pipeline), atol=1e-4)
    assert pull.num_steps == 4
    assert [progress for progress, _ in pull.calls] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert [timestep for _, timestep in pull.calls] == pipeline.scheduler.timesteps.tolist()
    assert torch.equal(run(pipeline, Pull(0.0)), run(pipeline))


def test_guides_pull_to_the_reference_without_the_noise_that_the_networks_see(pipeline):
    seen, pull = [], Pull(0.0)
    hook = pipeline.controlnet.register_forward_pre_hook(
        lambda module, arguments, options: seen.append(options["controlnet_cond"]), with_kwargs=True
    )
    for noise_aug in (0, 300):
        run(pipeline, pull, steps=1, noise_aug=noise_aug)
        assert torch.equal(pull.reference, reference_latents(pipeline))
    hook.remove()
    assert torch.equal(seen[0], pull.reference)
    signal = pipeline.scheduler.alphas_cumprod[300].item()
    noise = (seen[1] - signal**0.5 * pull.reference) / (1 - signal) ** 0.5
    assert noise.std().item() == pytest.approx(1.0, abs=0.1)
    assert abs(noise.mean().item()) < 0.1


def test_several_guides_act_in_turn_and_a_function_beside_them_is_called_back(pipeline):
    seen, reference = [], reference_latents(pipeline)

    def note(pipe, step_index, timestep, tensors):
        seen.append(step_index)
        return tensors

    class Opposite(Pull):
        def start(self, reference, num_steps):
            super().start(-reference, num_steps)

    ends = [run(pipeline, [*guides, note]) for guides in ([Pull(0.5), Opposite(1.0)], [Opposite(1.0), Pull(0.5)])]
    assert torch.allclose(ends[0], -reference, atol=1e-4)
    assert ends[1].abs().max() < 1e-4  # half way from -r to r
    assert seen == [0, 1, 2, 3] * 2


def test_the_coefficients_are_asked_once_for_all_guides(pipeline, monkeypatch):
    from milo_latent.guidance import x0

    asked, step_coefficients = [], x0.step_coefficients
    monkeypatch.setattr(x0, "step_coefficients", lambda *args: asked.append(args) or step_coefficients(*args))
    run(pipeline, [Pull(0.5), Pull(0.5)])
    assert len(asked) == 4


def test_a_guide_that_is_not_active_asks_nothing_of_the_scheduler(metric):
    output = torch.zeros(1, 4, 16, 16)
    for guide in (MILOGuidance(metric, 0.0), MILOGuidance(metric, start=0.5)):
        assert guide_model_output([guide], None, output, 0, output, progress=0.0) is output


def test_attached_and_as_a_callback_at_once_it_acts_once(pipeline, metric):
    guide = MILOGuidance(metric, 0.4, reference_latents=reference_latents(pipeline))
    once = run(pipeline, guide)
    with guide.attach(pipeline):
        assert torch.equal(run(pipeline, guide), once)
    assert torch.equal(run(pipeline, guide), once)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_attached_to_a_stock_pipeline_it_guides_every_step(stock, metric, guidance_scale):
    reference, _ = latent_pair()
    stock.scheduler = DDIMScheduler.from_config(stock.scheduler.config, set_alpha_to_one=True)
    guide = MILOGuidance(metric, milo_scale=1.0, schedule="constant", reference_latents=reference)
    before = run_stock(stock, guidance_scale=guidance_scale)
    for _ in range(2):  # two runs in one block
        with guide.attach(stock):
            guided = run_stock(stock, guidance_scale=guidance_scale)
        assert torch.allclose(guided, reference, atol=1e-4)
    assert "step" not in vars(stock.scheduler)
    assert torch.equal(run_stock(stock, guidance_scale=guidance_scale), before)


def test_without_a_block_it_guides_until_it_is_detached(stock, metric):
    before = run_stock(stock)
    guide = MILOGuidance(metric, milo_scale=0.4, reference_latents=latent_pair()[0])
    with guide.attach(stock) as entered:
        assert entered is guide
        guided = run_stock(stock)
    guide.attach(stock)
    assert torch.equal(run_stock(stock), guided)
    assert torch.equal(run_stock(stock), guided)
    with pytest.raises(ValueError, match=r"would pull twice.*`guide\.detach\(\)` ends"):
        guide.attach(stock)
    guide.detach()
    guide.detach()  # does nothing
    assert "step" not in vars(stock.scheduler)
    assert torch.equal(run_stock(stock), before)


def test_it_is_detached_from_one_pipeline_or_from_all(stock, pipeline, metric):
    guide = MILOGuidance(metric, reference_latents=latent_pair()[0])
    other = copy.copy(stock)
    other.scheduler = DDIMScheduler.from_config(stock.scheduler.config)
    guide.attach(stock), guide.attach(other)
    guide.detach(stock)
    assert "step" not in vars(stock.scheduler)
    assert "step" in vars(other.scheduler)
    guide.attach(stock)
    guide.detach()
    assert not {"step"} & (vars(stock.scheduler).keys() | vars(other.scheduler).keys())


def test_a_guide_that_is_dropped_or_whose_scheduler_is_replaced_says_so(stock, metric):
    before = run_stock(stock)
    with pytest.warns(UserWarning, match="A MILOGuidance was dropped while attached.*no longer guided") as caught:
        MILOGuidance(metric, reference_latents=latent_pair()[0]).attach(stock)
    assert Path(caught[0].filename).name == "test_callback.py"
    assert "step" not in vars(stock.scheduler)
    assert torch.equal(run_stock(stock), before)
    guide = MILOGuidance(metric, reference_latents=latent_pair()[0])
    guide.attach(stock)
    run_stock(stock)
    with pytest.warns(UserWarning, match="dropped while attached"):  # also after a run, which it knew of
        del guide
    guide = MILOGuidance(metric, reference_latents=latent_pair()[0])
    guide.attach(stock)
    stock.scheduler = DDIMScheduler.from_config(stock.scheduler.config)
    with pytest.warns(UserWarning, match="scheduler was replaced while a guide was attached"):
        guide.detach()


def test_the_hook_is_gone_after_a_failure(stock, metric):
    guide = MILOGuidance(metric, reference_latents=torch.zeros(1, 4, 20, 20))
    with pytest.raises(ValueError, match=r"\(1, 4, 16, 16\), got \(1, 4, 20, 20\)"), guide.attach(stock):
        run_stock(stock)
    assert "step" not in vars(stock.scheduler)


def test_as_a_plain_callback_it_says_that_it_misses_the_first_step(stock, metric):
    reference, _ = latent_pair()
    stock.scheduler = DDIMScheduler.from_config(stock.scheduler.config, set_alpha_to_one=True)
    guide = MILOGuidance(metric, milo_scale=1.0, schedule="constant", reference_latents=reference)
    for _ in range(2):
        with pytest.warns(UserWarning, match="from the second step on"):
            guided = run_stock(stock, guide)
        assert torch.allclose(guided, reference, atol=1e-4)
        assert "step" not in vars(stock.scheduler)


def test_the_settings_are_a_diffusers_config(metric, tmp_path):
    MILOGuidance(metric, milo_scale=0.25, schedule="linear").save_config(tmp_path)
    guide = MILOGuidance.from_config(tmp_path, metric=metric, milo_scale=0.5)
    assert (guide.milo_scale, guide.schedule, guide.metric) == (0.5, "linear", metric)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"milo_scale": 1.5}, r"`milo_scale` in \[0, 1\]"),
        ({"schedule": "square"}, "`schedule` to be one of"),
        ({"start": 0.8, "stop": 0.2}, r"`stop` in \[0.8, 1\]"),
        ({"reference_latents": torch.zeros(1, 16, 8, 8)}, "4 channels"),
    ],
)
def test_bad_settings_are_refused(metric, options, match):
    with pytest.raises(ValueError, match=match):
        MILOGuidance(metric, **options)


def test_a_stock_pipeline_needs_reference_latents(stock, metric):
    with pytest.raises(ValueError, match="reference_latents"), MILOGuidance(metric).attach(stock):
        run_stock(stock)


def test_guidance_outside_a_run_is_refused(metric):
    with pytest.raises(RuntimeError, match=r"guide\.attach"):
        MILOGuidance(metric)(torch.zeros(1, 4, 16, 16), progress=0.0, timestep=0.0)


def test_a_metric_for_other_channels_is_refused(pipeline):
    with pytest.raises(ValueError, match=r"trained on \(.*3 channels.*with 4 channels"):
        run(pipeline, MILOGuidance(tiny_metric(channels=3)))


def test_a_scheduler_it_does_not_know_is_refused_before_the_pipeline_works(pipeline, metric):
    pipeline.scheduler = IPNDMScheduler()
    with pytest.raises(ValueError, match="got IPNDMScheduler"):
        run(pipeline, MILOGuidance(metric))
