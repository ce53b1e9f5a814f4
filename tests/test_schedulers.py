"""Guided sampling equals a model that predicts the guided estimate itself, for every scheduler and prediction type.

The models here are independent of the code under test: they find the noise level from what a pipeline would see, which
is the scheduler's scaled input, its `alphas_cumprod` at the timestep, or its `sigmas` by count of steps.
"""

import functools
from types import SimpleNamespace

import diffusers
import pytest
import torch

from milo_latent import MILOGuidance
from milo_latent.guidance.coefficients import FAMILIES, KNOWN_SCHEDULERS, scheduler_family
from milo_latent.testing import generator, tiny_metric

pytestmark = pytest.mark.filterwarnings("ignore:Should have t:UserWarning")  # torchsde, of rounding
SHAPE = (1, 4, 16, 16)
REFERENCE = torch.randn(SHAPE, generator=generator(1))
CENTRE = torch.randn(SHAPE, generator=generator(2))
NEEDS = {"DPMSolverSDEScheduler": "torchsde", "CosineDPMSolverMultistepScheduler": "torchsde"}
NEEDS["LMSDiscreteScheduler"] = "scipy"
PREDICTIONS = {family: ("epsilon", "v_prediction", "sample") for family in FAMILIES}
PREDICTIONS |= {"flow": ("flow_prediction",), "edm": ("epsilon", "v_prediction")}
NO_SAMPLE = {  # diffusers raises for these
    "EulerAncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler",
    "DPMSolverSDEScheduler", "PNDMScheduler",
}  # fmt: skip
# the others end on the clean estimate of their last step; these keep some noise, or mix in earlier steps
KEEP_NOISE = ("DEISMultistepScheduler", "PNDMScheduler", "SASolverScheduler", "TCDScheduler")
ENDS_AT_REFERENCE = [name for name in KNOWN_SCHEDULERS if name not in KEEP_NOISE]
ZERO_SNR = (
    "DDIMScheduler", "DDPMScheduler", "LCMScheduler", "TCDScheduler", "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler",
)  # fmt: skip
EXTRA = {
    "DPMSolverMultistepScheduler": [
        {"solver_order": 3}, {"algorithm_type": "sde-dpmsolver++"}, {"euler_at_final": True},
        {"algorithm_type": "sde-dpmsolver++", "solver_order": 3},
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
        {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"},
    ],
    "DPMSolverSinglestepScheduler": [
        {"solver_order": 3}, {"algorithm_type": "sde-dpmsolver++"},
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
    ],
    "UniPCMultistepScheduler": [
        {"solver_order": 3}, {"disable_corrector": [0, 1]}, {"predict_x0": False, "final_sigmas_type": "sigma_min"},
        {"solver_type": "bh1", "final_sigmas_type": "sigma_min"},
    ],
    "SASolverScheduler": [{"algorithm_type": "noise_prediction"}],
    "DEISMultistepScheduler": [{"solver_order": 3}],
    "PNDMScheduler": [{"skip_prk_steps": False}, {"set_alpha_to_one": True}],
    "DDIMScheduler": [{"timestep_spacing": "trailing"}],
    "FlowMatchEulerDiscreteScheduler": [{"stochastic_sampling": True}, {"shift": 3.0}, {"use_karras_sigmas": True}],
}  # fmt: skip
SIGMAS = {"use_karras_sigmas": "epsilon", "use_exponential_sigmas": "v_prediction", "use_beta_sigmas": "epsilon"}


def family_of(name):
    return next(family for family, names in FAMILIES.items() if name in names)


def make(name, prediction_type, **options):
    """Return the scheduler, or skip where it needs an optional library."""
    if name in NEEDS or "use_beta_sigmas" in options:
        pytest.importorskip(NEEDS.get(name, "scipy"), reason=f"{name} needs it")
    cls, family = getattr(diffusers, name), family_of(name)
    taken = cls.__init__.__wrapped__.__code__.co_varnames
    if family != "flow":
        options["prediction_type"] = prediction_type
    defaults = {"clip_sample": False, "skip_prk_steps": True}
    if family not in ("flow", "edm"):
        defaults |= {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    return cls(**{key: value for key, value in defaults.items() if key in taken} | options)


def cases(schedulers=KNOWN_SCHEDULERS):
    for name in schedulers:
        for kind in PREDICTIONS[family_of(name)]:
            if not (kind == "sample" and name in NO_SAMPLE):
                yield pytest.param(name, kind, {}, id=f"{name}-{kind}")
                for options in EXTRA.get(name, []):
                    words = "-".join(f"{key}={value}" for key, value in options.items())
                    yield pytest.param(name, kind, options, id=f"{name}-{kind}-{words}")


def sigma_cases():
    for name in KNOWN_SCHEDULERS:
        taken = getattr(diffusers, name).__init__.__wrapped__.__code__.co_varnames
        for sigmas, kind in SIGMAS.items():
            if sigmas in taken and name not in FAMILIES["flow"]:
                yield pytest.param(name, kind, {sigmas: True}, id=f"{name}-{kind}-{sigmas}")
        if "use_flow_sigmas" in taken:
            options = {"use_flow_sigmas": True, "flow_shift": 2.0}
            yield pytest.param(name, "flow_prediction", options, id=f"{name}-flow")


class Denoiser:
    """A model whose clean estimate is a known function of its input; its output has the scheduler's prediction type."""

    def __init__(self, scheduler, estimate, dtype=torch.float32):
        self.scheduler, self.estimate, self.dtype, self.calls = scheduler, estimate, dtype, 0
        if family_of(type(scheduler).__name__) == "sigma":  # 1 + sigma^2 in float32 would hide small sigmas
            for name in {"sigmas", "sigmas_interpol"} & set(vars(scheduler)):
                setattr(scheduler, name, getattr(scheduler, name).double())

    def noise_level(self, timestep):
        """Return alpha and sigma of the sample."""
        scheduler, family = self.scheduler, family_of(type(self.scheduler).__name__)
        if family == "timestep":
            product = scheduler.alphas_cumprod[int(timestep)].double()
            return product.sqrt(), (1 - product).sqrt()
        if family == "sigma":  # scaled by 1 / sqrt(sigma^2 + 1)
            scale = scheduler.scale_model_input(torch.ones(1, dtype=torch.float64), timestep)
            return 1.0, (1 / scale**2 - 1).sqrt()
        sigma = scheduler.sigmas[self.calls].double()
        if type(scheduler).__name__ == "FlowMatchHeunDiscreteScheduler":
            sigma = timestep.double() / scheduler.config.num_train_timesteps
        if family == "flow" or scheduler.config.get("use_flow_sigmas"):
            return 1 - sigma, sigma
        if family == "edm":
            return 1.0, sigma
        return 1 / (1 + sigma**2).sqrt(), sigma / (1 + sigma**2).sqrt()

    def __call__(self, sample, timestep):
        alpha, sigma = self.noise_level(timestep)
        self.calls += 1
        sample = sample.double()
        x0 = self.estimate(sample / (alpha**2 + sigma**2) ** 0.5)
        return self.output(sample, x0, alpha, sigma).to(self.dtype)

    def output(self, sample, x0, alpha, sigma):
        config = self.scheduler.config
        kind = config.get("prediction_type", "flow_prediction")
        if "sigma_data" in config:  # Karras et al. 2022, table 1
            data = config.sigma_data
            c_skip, c_out = data**2 / (sigma**2 + data**2), sigma * data / (sigma**2 + data**2) ** 0.5
            return (x0 - c_skip * sample) / (c_out if kind == "epsilon" else -c_out)
        noise = (sample - alpha * x0) / sigma
        norm = (alpha**2 + sigma**2) ** 0.5
        return {
            "epsilon": noise,
            "v_prediction": (alpha * noise - sigma * x0) / norm,
            "sample": x0,
            "flow_prediction": noise - x0,
        }[kind]


def denoise(scheduler, estimate, *, steps=6, guide=None, shape=SHAPE, dtype=torch.float32):
    """Run the loop of every pipeline; return its result and the clean estimates that the scheduler returns."""
    scheduler.set_timesteps(steps)
    draw = generator(0)
    sample = torch.randn(shape, generator=draw) * getattr(scheduler, "init_noise_sigma", 1.0)
    sample, model, told = sample.to(dtype), Denoiser(scheduler, estimate, dtype), []
    taken = scheduler.step.__code__.co_varnames
    options = {"generator": draw} if "generator" in taken else {}
    torch.manual_seed(0)  # of Brownian trees
    attached = guide.attach(SimpleNamespace(scheduler=scheduler)) if guide else SimpleNamespace()
    with attached if guide else torch.no_grad():
        for timestep in scheduler.timesteps:
            scheduler.scale_model_input(sample, timestep) if hasattr(scheduler, "scale_model_input") else None
            result = scheduler.step(model(sample, timestep), timestep, sample, **options)
            sample = result.prev_sample
            told.append(result.get("pred_original_sample"))
    return sample, told


def known_estimate(scaled):
    return 0.5 * CENTRE + 0.3 * torch.tanh(scaled)


def guided_estimate(scaled, scale=0.4):
    return known_estimate(scaled) + scale * (REFERENCE - known_estimate(scaled))


def make_guide(scale, **options):
    options = {"schedule": "constant", "reference_latents": REFERENCE} | options
    return MILOGuidance(shared_metric(), milo_scale=scale, **options)


@functools.cache
def shared_metric():
    return tiny_metric()


@pytest.mark.parametrize(("name", "kind", "options"), [*cases(), *sigma_cases()])
def test_guided_sampling_equals_a_model_that_predicts_the_guided_estimate(name, kind, options):
    guided, told = denoise(make(name, kind, **options), known_estimate, guide=make_guide(0.4))
    expected, expected_told = denoise(make(name, kind, **options), guided_estimate)
    unguided, _ = denoise(make(name, kind, **options), known_estimate)
    scale = expected.abs().max().clamp(min=1)
    assert (guided - expected).abs().max() / scale < 1e-5
    assert (guided - unguided).abs().mean() > 0.05
    for ours, theirs in zip(told, expected_told, strict=True):
        if ours is not None:
            # at large sigmas, sample - sigma * eps in float32
            assert (ours - theirs).abs().max() / theirs.abs().max() < 2e-4


@pytest.mark.parametrize(("name", "kind", "options"), [case for case in cases() if case.values[2] == {}])
def test_strength_zero_gives_identical_bits(name, kind, options):
    plain, _ = denoise(make(name, kind, **options), known_estimate)
    guided, _ = denoise(make(name, kind, **options), known_estimate, guide=make_guide(0.0, trace=True))
    assert torch.equal(plain, guided)


@pytest.mark.parametrize(
    ("name", "kind", "options"), [case for case in cases(ENDS_AT_REFERENCE) if case.values[2] == {}]
)
def test_full_strength_with_equal_weights_ends_at_the_reference(name, kind, options):
    more = {"set_alpha_to_one": True} if name.startswith("DDIM") else {}
    end, _ = denoise(make(name, kind, **more), known_estimate, guide=make_guide(1.0))
    assert (end - REFERENCE).abs().max() < 2e-5


@pytest.mark.parametrize("name", ZERO_SNR)
def test_zero_terminal_snr_is_exact_for_v(name):
    options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    guided, _ = denoise(make(name, "v_prediction", **options), known_estimate, guide=make_guide(0.4))
    expected, _ = denoise(make(name, "v_prediction", **options), guided_estimate)
    assert (guided - expected).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "LCMScheduler", "TCDScheduler"])
def test_an_epsilon_model_at_zero_terminal_snr_is_refused(name):
    scheduler = make(name, "epsilon", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    with pytest.raises(ValueError, match="epsilon model says nothing of x0"):
        denoise(scheduler, lambda scaled: torch.zeros_like(scaled), guide=make_guide(0.4), steps=3)


def change_of_result(name, *, inside):
    """Return how far a pull inside or after the fifth call of `step` moves the result of fixed model outputs."""
    ends = []
    for scale in (0.0, 0.4):
        scheduler, draw = make(name, "epsilon"), generator(3)
        scheduler.set_timesteps(6)
        sample = torch.randn(SHAPE, generator=draw) * scheduler.init_noise_sigma
        guide = make_guide(scale if inside else 0.0, start=0.0, stop=1.0)
        guide.milo_scale = lambda timestep, at=scheduler.timesteps[4], scale=guide.milo_scale: scale * (timestep == at)
        with guide.attach(SimpleNamespace(scheduler=scheduler)):
            for call, timestep in enumerate(scheduler.timesteps):
                output = torch.randn(SHAPE, generator=draw)
                sample = scheduler.step(output, timestep, sample).prev_sample
                if call == 4 and not inside:
                    sample = sample + scale * (REFERENCE - sample)
        ends.append(sample)
    return (ends[0] - ends[1]).abs().mean()


@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "UniPCMultistepScheduler", "DDIMScheduler"])
def test_guidance_is_not_undone_where_an_edit_after_the_step_is(name):
    assert change_of_result(name, inside=True) > 0.05
    if name == "HeunDiscreteScheduler":  # continues from the sample that it kept
        assert change_of_result(name, inside=False) < 1e-6


def test_half_steps_count_as_steps_of_the_curriculum():
    seen = []
    guide = make_guide(0.4, schedule=lambda progress: seen.append(progress) or progress)
    denoise(make("HeunDiscreteScheduler", "epsilon"), known_estimate, steps=4, guide=guide)
    assert seen == pytest.approx([step / 6 for step in range(7)])


def test_every_scheduler_is_refused_by_name_or_known():
    classes = {name: getattr(diffusers.schedulers, name) for name in dir(diffusers.schedulers)}
    schedulers = {name for name, each in classes.items() if isinstance(each, type) and hasattr(each, "set_timesteps")}
    unknown = schedulers - set(KNOWN_SCHEDULERS) - {"SchedulerMixin"}
    assert "DDIMInverseScheduler" in unknown
    for name in unknown:
        with pytest.raises(ValueError, match=rf"got {name}\. Known: DDPMScheduler, .*FlowMatchEuler"):
            scheduler_family(classes[name].__new__(classes[name]))
    for name in KNOWN_SCHEDULERS:
        cls = getattr(diffusers, name)
        assert name in FAMILIES[scheduler_family(cls.__new__(cls))]
