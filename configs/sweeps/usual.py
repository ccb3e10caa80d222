"""The usual sweeps, of any configuration: each generator yields overrides, {key: value}.

psa-jax sweep --config=tiny:dpo --sweep=beta,seed --launcher=print --workdir=runs/sweep

--sweep=beta,seed trains every β with every seed, --sweep=beta+learning_rate the first β with the first learning rate,
and so on. A generator that takes the configuration may start from its values. A file of a configuration may have
generators of its own, which go before those of the same name here.
"""

from psa_jax.errors import PSAError


def _around(value, *factors):
    """Multiples of a value, to three digits."""
    return [float(f"{factor * value:.3g}") for factor in factors]


def _require_pairs(config, name):
    if config.objective.loss == "none":
        raise PSAError(
            f"--sweep={name}: objective.loss is none, so no pair is compared and every point would be the same; "
            "sweep a configuration of preference learning, such as tiny:dpo, or swap_weight"
        )


def sweep_seed():
    """Three trainings alike but for their seed: what a difference is compared with."""
    for seed in range(3):
        yield {"seed": seed}


def sweep_learning_rate(config):
    for rate in _around(config.optimizer.learning_rate, 0.3, 1.0, 3.0):
        yield {"optimizer.learning_rate": rate}


def sweep_batch_size(config):
    """Twice and four times the batch, with the learning rate's square root, in as many parts as fit the memory."""
    for factor in (1, 2, 4):
        rate = float(f"{config.optimizer.learning_rate * factor**0.5:.3g}")
        accumulate = config.accumulate * factor
        yield {"batch_size": config.batch_size * factor, "accumulate": accumulate, "optimizer.learning_rate": rate}


def sweep_weight_decay():
    for decay in (0.0, 1e-3, 1e-2, 1e-1):
        yield {"optimizer.weight_decay": decay}


def sweep_ema():
    for decay in (0.0, 0.99, 0.999):
        yield {"optimizer.ema": decay}


def sweep_beta(config):
    _require_pairs(config, "beta")
    for beta in _around(config.objective.beta, 0.3, 1.0, 3.0):
        yield {"objective.beta": beta}


def sweep_sft_weight(config):
    """The SFT term as a share of β, from none."""
    _require_pairs(config, "sft_weight")
    for weight in _around(config.objective.beta, 0.0, 0.1, 0.3, 1.0):
        yield {"objective.sft_weight": weight}


def sweep_swap_weight():
    for weight in (0.5, 1.0, 2.0, 4.0):
        yield {"objective.swap_weight": weight}


def sweep_loss(config):
    """Losses that look at one pair at a time and need nothing else."""
    _require_pairs(config, "loss")
    for loss in ("sigmoid", "ipo", "hinge"):
        yield {"objective.loss": loss}


def sweep_text_dropout():
    for share in (0.0, 0.1, 0.2):
        yield {"objective.text_dropout": share}


def sweep_kind():
    """Kinds of adapter that read the user's tokens themselves."""
    for kind in ("text", "concept", "prompt", "rewrite", "edit"):
        yield {"adapter.kind": kind, "adapter.tokens": 4, "adapter.gate": "attention", "adapter.pooled": False}


def sweep_tokens():
    for tokens in (1, 4, 8):
        yield {"adapter.tokens": tokens}


def sweep_banned_share():
    """How many of the examples with an unsafe prompt are of a user who bans it."""
    for share in (0.25, 0.5, 0.75, 0.9):
        yield {"data.banned_share": share}
