"""`scheduler_config.json` to samplers: released folders, other samplers for them, and what is refused."""

import diffusers
import pytest
from torch_samplers import BETAS, assert_same

from psa_jax.diffusion.scheduler_config import SAMPLERS, sampler_from_config
from psa_jax.errors import PSAError

# diffusers turns tensors into arrays in an old way.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

# `scheduler_config.json` as released.
SD15 = BETAS | {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
SD21 = SD15 | {"_class_name": "DDIMScheduler", "_diffusers_version": "0.8.0", "prediction_type": "v_prediction"}
SDXL = BETAS | {
    "_class_name": "EulerDiscreteScheduler",
    "_diffusers_version": "0.19.0.dev0",
    "clip_sample": False,
    "interpolation_type": "linear",
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}
SD_TURBO = SDXL | {
    "_diffusers_version": "0.24.0.dev0",
    "sigma_max": None,
    "sigma_min": None,
    "timestep_spacing": "trailing",
    "timestep_type": "discrete",
}
SDXL_TURBO = SDXL | {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}
RELEASED = {"sd1.5": SD15, "sd2.1": SD21, "sdxl": SDXL, "sd-turbo": SD_TURBO, "sdxl-turbo": SDXL_TURBO}

ZERO_SNR_NOISE = BETAS | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("family", RELEASED)
def test_released_folders_with_every_sampler(monkeypatch, family, name):
    config = RELEASED[family]
    scheduler = getattr(diffusers, SAMPLERS[name][0]).from_config(config)
    assert_same(monkeypatch, sampler_from_config(config, 4, name), scheduler, 4)


@pytest.mark.parametrize("steps", [1, 20])
@pytest.mark.parametrize("family", RELEASED)
def test_released_folders(monkeypatch, family, steps):
    config = RELEASED[family]
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    assert_same(monkeypatch, sampler_from_config(config, steps), scheduler, steps)


@pytest.mark.parametrize("name", ["euler", "dpmsolver++"])
@pytest.mark.parametrize("wanted", [True, False])
def test_karras_by_option(monkeypatch, name, wanted):
    config = SDXL | {"use_karras_sigmas": not wanted}
    scheduler = getattr(diffusers, SAMPLERS[name][0]).from_config(config, use_karras_sigmas=wanted)
    assert_same(monkeypatch, sampler_from_config(config, 5, name, karras=wanted), scheduler, 5)


def test_what_was_only_a_default_of_the_other_class_is_left_out(monkeypatch):
    # A live config lists its defaults: the leading spacing of DDIM is not taken over by Euler.
    live = dict(diffusers.DDIMScheduler(**BETAS).config)
    scheduler = diffusers.EulerDiscreteScheduler.from_config(live)
    assert scheduler.config.timestep_spacing == "linspace"
    assert_same(monkeypatch, sampler_from_config(live, 5, "euler"), scheduler, 5)


@pytest.mark.parametrize(
    ("config", "name", "named"),
    [
        (SD15 | {"_class_name": "DDPMScheduler"}, None, ["DDPMScheduler", "choose a sampler", "pndm"]),
        (BETAS, None, ["None is not supported", "choose a sampler"]),
        (SD15 | {"skip_prk_steps": False}, None, ["skip_prk_steps False", "pndm", "True"]),
        (BETAS | {"skip_prk_steps": False}, "pndm", ["skip_prk_steps False"]),
        (SD15 | {"rescale_betas_zero_snr": True}, None, ["rescale_betas_zero_snr", "pndm"]),
        (SD15 | {"clip_sample": True}, None, ["clip_sample", "pndm"]),
        (SDXL_TURBO | {"use_karras_sigmas": True}, None, ["use_karras_sigmas", "euler-ancestral"]),
        (SDXL | {"interpolation_type": "log_linear"}, None, ["interpolation_type 'log_linear'", "only linear"]),
        (SDXL | {"timestep_type": "continuous"}, None, ["timestep_type"]),
        (SDXL | {"timestep_spacing": "sideways"}, None, ["timestep_spacing 'sideways'", "leading, linspace, trailing"]),
        (SDXL | {"final_sigmas_type": "one"}, None, ["final_sigmas_type"]),
        (SDXL | {"sigma_max": 700.0}, None, ["sigma_max 700.0"]),
        (SDXL | {"use_beta_sigmas": True}, None, ["use_beta_sigmas"]),
        (SDXL | {"use_exponential_sigmas": True}, None, ["use_exponential_sigmas"]),
        (SDXL | {"trained_betas": [0.1, 0.2]}, None, ["trained_betas"]),
        (SDXL | {"thresholding": True}, None, ["thresholding"]),
        (SDXL | {"use_flow_sigmas": True}, "dpmsolver++", ["use_flow_sigmas"]),
        (SDXL | {"use_lu_lambdas": True}, "dpmsolver++", ["use_lu_lambdas"]),
        (SDXL | {"solver_order": 3}, "dpmsolver++", ["solver_order 3", "1, 2"]),
        (SDXL | {"solver_type": "bh2"}, "dpmsolver++", ["solver_type 'bh2'", "midpoint, heun"]),
        (SDXL | {"algorithm_type": "sde-dpmsolver++"}, "dpmsolver++", ["algorithm_type 'sde-dpmsolver++'"]),
        (SDXL | {"variance_type": "learned"}, "dpmsolver++", ["variance_type"]),
        (SDXL | {"prediction_type": "sample"}, "euler-ancestral", ["prediction_type 'sample'"]),
        (SDXL | {"steps_offset": "1"}, None, ["steps_offset must be a int, not '1'"]),
        (SDXL | {"use_karras_sigmas": 1}, None, ["use_karras_sigmas must be a bool"]),
        (SDXL | {"stepz_offset": 1}, None, ["unknown keys stepz_offset"]),
        (ZERO_SNR_NOISE, "ddim", ["rescale_betas_zero_snr", "epsilon"]),
    ],
)
def test_what_is_not_done_is_refused_by_name(config, name, named):
    with pytest.raises(PSAError) as caught:
        sampler_from_config(config, 10, name)
    text = str(caught.value)
    assert all(part in text for part in named), text
    assert "\n" not in text


def test_keys_that_only_another_sampler_understands_are_dropped_when_it_is_replaced(monkeypatch):
    config = (
        SD21
        | {"_class_name": "UniPCMultistepScheduler", "predict_x0": True, "solver_p": None}
        | {"use_karras_sigmas": True}
    )
    scheduler = diffusers.DDIMScheduler.from_config(config)
    assert_same(monkeypatch, sampler_from_config(config, 4, "ddim"), scheduler, 4)
    with pytest.raises(PSAError, match="UniPCMultistepScheduler"):
        sampler_from_config(config, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "lms"}, "sampler 'lms' is unknown; choose one of ddim, euler"),
        ({"name": "ddim", "eta": 1.5}, "eta must be between 0 and 1, got 1.5"),
        ({"name": "euler", "eta": 0.5}, "eta is DDIM's; euler does not use it"),
        ({"name": "pndm", "karras": True}, "Karras' noise levels are not supported by pndm"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(PSAError, match=message):
        sampler_from_config(SD15, 10, **options)
