"""Objectives: every setting that cannot be is refused, all can be configured, and what β means."""

import dataclasses
import math
import re

import pytest

from psa_jax.errors import PSAError
from psa_jax.preference.losses import LOSSES
from psa_jax.preference.objective import Objective, describe_beta, effective_beta
from psa_jax.tools.configs import read_config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "sigmod"}, "objective.loss is 'sigmod'; choose sigmoid, cdpo, robust, ipo, hinge, kto, mapo, dmpo"),
        ({"timestep_weight": "snrr"}, "objective.timestep_weight is 'snrr'; choose none, snr, min_snr"),
        ({"label_smoothing": 0.5}, "objective.label_smoothing is 0.5; give 0 or more and less than 0.5"),
        ({"label_smoothing": -0.1}, "objective.label_smoothing is -0.1"),
        ({"loss": "dmpo", "label_smoothing": 0.0}, "objective.label_smoothing is 0.0; give more than 0 for dmpo"),
        ({"beta": 0.0}, "objective.beta is 0.0; give a positive number"),
        ({"beta": math.nan}, "objective.beta is nan"),
        ({"sft_weight": -1.0}, "objective.sft_weight is -1.0; give 0 or a positive number"),
        ({"reference_kl_weight": math.inf}, "objective.reference_kl_weight is inf"),
        ({"sdpo_mu": 1.5}, "objective.sdpo_mu is 1.5; give 0 to 1, or None to do without"),
        ({"user_dropout": 1.1}, "objective.user_dropout is 1.1; give a share from 0 to 1"),
        ({"safe_weight": -0.5}, "objective.safe_weight is -0.5"),
        ({"banned_weight": 0.0, "allowed_weight": 0.0, "safe_weight": 0.0}, "give one of them a weight"),
        ({"timestep_low": 0.8, "timestep_high": 0.2}, "0 <= timestep_low < timestep_high <= 1"),
    ],
)
def test_what_cannot_be_is_refused(change, message):
    with pytest.raises(PSAError, match=re.escape(message)):
        Objective(**change)


@pytest.mark.parametrize("name", LOSSES)
def test_one_line_of_the_configuration_chooses_the_loss(name, pytestconfig):
    config = read_config(str(pytestconfig.rootpath / "configs" / "tiny.py"), [("objective.loss", name)])
    objective = Objective(**config.objective)
    assert objective.loss == name
    assert {field.name for field in dataclasses.fields(Objective)} == set(config.objective)  # all can be set
    assert objective.sdpo_mu is None


def test_effective_beta():
    # 64·64·4 = 16384 numbers: 5000/16384. A margin of 1 is an error difference of 2/5000.
    assert effective_beta(5000.0, (64, 64, 4)) == pytest.approx(0.30517578)
    line = describe_beta(5000.0, (64, 64, 4))
    assert "β = 5000 " in line and "64×64×4" in line and "0.3052 on sums" in line and "0.0004 apart" in line
