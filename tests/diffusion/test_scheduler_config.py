"""`scheduler_config.json` to samplers: released folders, other samplers for them, and what is refused."""

import inspect
import json

import diffusers
import pytest
import torch
from support.torch_samplers import BETAS, assert_same

from psa_jax.diffusion import sampler_tables
from psa_jax.diffusion.sampler_registry import SAMPLERS, with_karras
from psa_jax.diffusion.schedule import DEFAULTS
from psa_jax.diffusion.scheduler_config import INERT, sampler_from_config, sampler_keys
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
    scheduler = getattr(diffusers, SAMPLERS[name].scheduler).from_config(config)
    assert_same(monkeypatch, sampler_from_config(config, 4, name), scheduler, 4)


@pytest.mark.parametrize("steps", [1, 20])
@pytest.mark.parametrize("family", RELEASED)
def test_released_folders(monkeypatch, family, steps):
    config = RELEASED[family]
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    assert_same(monkeypatch, sampler_from_config(config, steps), scheduler, steps)


@pytest.mark.parametrize("name", ["euler", "dpmsolver++", "unipc"])
@pytest.mark.parametrize("wanted", [True, False])
def test_karras_by_option(monkeypatch, name, wanted):
    config = SDXL | {"use_karras_sigmas": not wanted}
    scheduler = getattr(diffusers, SAMPLERS[name].scheduler).from_config(config, use_karras_sigmas=wanted)
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
        (SDXL | {"interpolation_type": "log_linear"}, None, ["interpolation_type 'log_linear'", "only linear"]),
        (SDXL | {"timestep_type": "continuous"}, None, ["timestep_type"]),
        (SDXL | {"timestep_spacing": "sideways"}, None, ["timestep_spacing 'sideways'", "leading, linspace, trailing"]),
        (SDXL | {"final_sigmas_type": "one"}, None, ["final_sigmas_type"]),
        (SDXL | {"sigma_max": 700.0}, None, ["sigma_max 700.0"]),
        (SDXL | {"use_beta_sigmas": True}, None, ["use_beta_sigmas"]),
        (SDXL | {"use_exponential_sigmas": True}, None, ["use_exponential_sigmas"]),
        (SDXL | {"trained_betas": [0.1, 0.2]}, None, ["trained_betas"]),
        (
            SDXL | {"thresholding": True},
            "ddim",
            ["thresholding True is not supported", "a sampler: euler"],
        ),
        (SDXL | {"thresholding": True}, "unipc", ["thresholding"]),
        (SDXL | {"sigma_min": 0.1}, "unipc", ["sigma_min 0.1"]),
        (SDXL | {"use_flow_sigmas": True}, "unipc", ["use_flow_sigmas"]),
        (SDXL | {"use_dynamic_shifting": True}, "unipc", ["use_dynamic_shifting"]),
        (SDXL | {"shift_terminal": 0.1}, "unipc", ["shift_terminal"]),
        (SDXL | {"solver_p": {}}, "unipc", ["solver_p {} is not supported by unipc (only None)"]),
        (SDXL | {"solver_order": 4}, "unipc", ["solver_order 4", "1, 2, 3"]),
        (SDXL | {"solver_type": "rk4"}, "unipc", ["solver_type 'rk4'", "bh1, bh2"]),
        (SDXL | {"predict_x0": 1}, "unipc", ["predict_x0 must be a bool"]),
        (SDXL | {"disable_corrector": None}, "unipc", ["disable_corrector must be a list"]),
        (SDXL | {"disable_corrector": [0, "1"]}, "unipc", ["disable_corrector must be a list of steps, not [0, '1']"]),
        (SDXL | {"use_flow_sigmas": True}, "dpmsolver++", ["use_flow_sigmas"]),
        (SDXL | {"use_lu_lambdas": True}, "dpmsolver++", ["use_lu_lambdas"]),
        (SDXL | {"solver_order": 4}, "dpmsolver++", ["solver_order 4", "1, 2, 3"]),
        (SDXL | {"solver_type": "bh3"}, "dpmsolver++", ["solver_type 'bh3'", "midpoint, heun"]),
        (SDXL | {"algorithm_type": "sde-dpmsolver++"}, "dpmsolver++", ["algorithm_type 'sde-dpmsolver++'"]),
        (SDXL | {"variance_type": "learned"}, "dpmsolver++", ["variance_type"]),
        (SDXL | {"prediction_type": "sample"}, "euler-ancestral", ["prediction_type 'sample'"]),
        (SDXL | {"steps_offset": "1"}, None, ["steps_offset must be a int, not '1'"]),
        (SDXL | {"use_karras_sigmas": 1}, None, ["use_karras_sigmas must be a bool"]),
        (ZERO_SNR_NOISE, "ddim", ["rescale_betas_zero_snr", "epsilon"]),
    ],
)
def test_what_is_not_done_is_refused_by_name(config, name, named):
    with pytest.raises(PSAError) as caught:
        sampler_from_config(config, 10, name)
    text = str(caught.value)
    assert all(part in text for part in named), text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (SD15 | {"rescale_betas_zero_snr": True, "use_karras_sigmas": True, "thresholding": True}, "pndm"),
        (SD15 | {"clip_sample": True, "solver_order": 9, "solver_type": "none"}, "pndm"),
        (SDXL_TURBO | {"use_karras_sigmas": True, "sigma_min": 0.1, "final_sigmas_type": "one"}, "euler-ancestral"),
        (SDXL | {"thresholding": True, "variance_type": "learned", "shift_terminal": 0.2}, "euler"),
        (SD21 | {"stepz_offset": 7, "interpolation_type": "log_linear", "tags": {"a": [1]}}, "ddim"),
        (SDXL | {"clip_sample": True, "interpolation_type": "log_linear", "sigma_max": 9.0}, "dpmsolver++"),
        (SDXL | {"algorithm_type": "sde-dpmsolver++", "variance_type": "learned", "use_lu_lambdas": True}, "unipc"),
    ],
)
def test_keys_that_a_class_of_diffusers_does_not_read_are_no_error(monkeypatch, config, name):
    config = config | {"_class_name": SAMPLERS[name].scheduler}
    scheduler = getattr(diffusers, SAMPLERS[name].scheduler).from_config(config)
    assert_same(monkeypatch, sampler_from_config(config, 4), scheduler, 4)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_key_that_a_class_of_diffusers_reads_is_known(name):
    theirs = inspect.signature(getattr(diffusers, SAMPLERS[name].scheduler).__init__).parameters.keys() - {"self"}
    known = {*DEFAULTS, *sampler_keys(name), *SAMPLERS[name].neutral, *INERT, "trained_betas"}
    assert theirs <= known
    # And what is left out there is left out here.
    assert {*sampler_keys(name), *SAMPLERS[name].neutral} - {"beta_schedule"} <= theirs


# Of schedulers that are only asked for their settings.
OLD_WAYS = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::RuntimeWarning")


def own_schedulers():
    """Schedulers of diffusers with the settings that folders have."""
    solvers = {"use_karras_sigmas": True, "solver_order": 3}
    for scheduler in diffusers.schedulers.KarrasDiffusionSchedulers.__members__:
        if "beta_start" in inspect.signature(getattr(diffusers, scheduler).__init__).parameters:
            yield scheduler, {}
    yield "LCMScheduler", {}
    yield "TCDScheduler", {}
    yield "DDPMScheduler", {"variance_type": "learned", "clip_sample": True}
    yield "DEISMultistepScheduler", {"steps_offset": 1, "use_karras_sigmas": True}
    yield "DPMSolverMultistepScheduler", solvers | {"solver_type": "heun"}
    yield "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}
    yield "DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}
    yield "DPMSolverSinglestepScheduler", {"lower_order_final": True, "solver_order": 2}
    yield "UniPCMultistepScheduler", solvers | {"solver_type": "bh1", "final_sigmas_type": "sigma_min"}
    yield "UniPCMultistepScheduler", {"predict_x0": False, "final_sigmas_type": "sigma_min", "disable_corrector": [0]}
    yield "HeunDiscreteScheduler", {"use_karras_sigmas": True, "clip_sample": True}
    yield "EulerDiscreteScheduler", {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    yield "DDIMScheduler", {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}


@OLD_WAYS
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_on_a_folder_of_every_scheduler(monkeypatch, tmp_path, name):
    """As `NewScheduler.from_config(scheduler.config)` makes it, or refused where it makes none or what is not done."""
    target, loaded = getattr(diffusers, SAMPLERS[name].scheduler), 0
    for own, settings in own_schedulers():
        getattr(diffusers, own)(**BETAS | settings).save_pretrained(tmp_path)
        config = json.loads((tmp_path / "scheduler_config.json").read_text())
        live = getattr(diffusers, own).from_pretrained(tmp_path).config
        options = {"skip_prk_steps": True} if name == "pndm" and own != SAMPLERS[name].scheduler else {}
        if config.get("algorithm_type") in ("sde-dpmsolver++", "dpmsolver") and name == "dpmsolver++":
            with pytest.raises(PSAError, match="algorithm_type .* is not supported by dpmsolver"):
                sampler_from_config(config, 5, name)
            continue
        if (config.get("algorithm_type"), name) == ("deis", "dpmsolver++"):
            # diffusers means it to be DPM-Solver++ too, and fails over the order of its checks.
            options["algorithm_type"] = "dpmsolver++"
        if (config.get("variance_type"), name) == ("learned", "dpmsolver++"):
            with pytest.raises(PSAError, match="variance_type 'learned'"):
                sampler_from_config(config, 5, name)
            continue
        if name == "unipc" and not config.get("lower_order_final", True):
            with pytest.raises(PSAError, match="unipc ends in no finite picture"):
                sampler_from_config(config, 5, name)
            continue
        scheduler = target.from_config(live, **options)
        if (name, scheduler.config.get("rescale_betas_zero_snr")) == ("ddim", True) and own == "EulerDiscreteScheduler":
            with pytest.raises(PSAError, match="rescale_betas_zero_snr leaves no signal"):
                sampler_from_config(config, 5, name)
            continue
        assert_same(monkeypatch, sampler_from_config(config, 5, name), scheduler, 5)
        loaded += 1
    assert loaded >= 18


@OLD_WAYS
def test_every_sampler_that_an_error_recommends_can_be_used(tmp_path):
    for own, settings in own_schedulers():
        getattr(diffusers, own)(**BETAS | settings).save_pretrained(tmp_path)
        config = json.loads((tmp_path / "scheduler_config.json").read_text())
        try:
            sampler_from_config(config, 5)
        except PSAError as error:
            names = str(error).partition("choose a sampler: ")[2].split(", ")
            assert len(names) >= 4, error
            for name in names:
                assert sampler_from_config(config, 5, name).calls >= 5


@pytest.mark.parametrize(
    "settings",
    [
        {"solver_type": "bh1"},
        {"predict_x0": False},
        {"lower_order_final": False},
        {"lower_order_final": False, "solver_order": 3},
        {"lower_order_final": False, "solver_order": 3, "use_karras_sigmas": True, "final_sigmas_type": "sigma_min"},
    ],
)
def test_unipc_settings_with_which_diffusers_ends_in_nan_are_refused(settings):
    config = BETAS | {"_class_name": "UniPCMultistepScheduler"} | settings
    scheduler = diffusers.UniPCMultistepScheduler(**BETAS | settings)
    scheduler.set_timesteps(5)
    latents = torch.ones(1, 1, 2, 2)
    try:
        for timestep in scheduler.timesteps:
            latents = scheduler.step(torch.ones_like(latents), timestep, latents).prev_sample
        assert not latents.isfinite().any()
    except RuntimeError as error:
        assert "singular" in str(error)
    with pytest.raises(PSAError, match="unipc ends in no finite picture with solver_type bh"):
        sampler_from_config(config, 5)
    way_out = {"solver_type": "bh2", "predict_x0": True, "lower_order_final": True, "final_sigmas_type": "zero"}
    assert sampler_from_config(config | way_out, 5).calls == 5
    assert sampler_from_config(config, 5, "euler").calls == 5


def test_too_few_steps_for_runge_kutta():
    with pytest.raises(PSAError, match="skip_prk_steps false needs 4 sampling steps or more, got 3"):
        sampler_from_config(SD15 | {"skip_prk_steps": False}, 3)


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


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_registry_says_what_the_tables_read(name):
    entry, keys = SAMPLERS[name], sampler_keys(name)
    assert callable(getattr(sampler_tables, entry.table))
    assert entry.karras == ("use_karras_sigmas" in keys) == (name in with_karras())
    assert bool(entry.solver_types) == ("solver_type" in keys)
    assert keys.keys().isdisjoint(entry.neutral)
