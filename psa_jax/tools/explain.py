"""`psa-jax explain`: what an adapter with the gate by categories replaces in a prompt for a user, and why.

What a user bans is personal: it is printed, and written nowhere.
"""

import json
from argparse import Namespace

import jax
import jax.numpy as jnp
import numpy as np

from psa_jax.diffusion.conditioning import prompt_gates
from psa_jax.evaluation.gate_words import sentence
from psa_jax.interop.adapter_file import find_adapter, read_metadata
from psa_jax.interop.base_model import BaseModel
from psa_jax.interop.native import load_adapter
from psa_jax.models.gates import combine
from psa_jax.profiles.gate_file import require_gate
from psa_jax.profiles.schema import CATEGORIES
from psa_jax.profiles.user_embedding import user_embedding
from psa_jax.progress import print_on_main


def run(args: Namespace) -> int:
    """Prints a sentence for each prompt, and as the last line on stdout the gates as JSON.

    Raises:
      PSAError: a wrong flag, or an adapter without a gate by categories.
    """
    path = find_adapter(args.adapter)
    about = read_metadata(path)
    user = user_embedding(path, about, profile=args.profile, user=args.user, table=args.table)
    model = BaseModel.from_config(vars(args)).load(abstract=("vae", "unet"))
    model.require_base_of(path, about)
    unet = model.unet.config
    adapter = load_adapter(path, unet.cross_attentions, unet.cross_attention_dim)
    require_gate(path, adapter.config)
    bans = jax.nn.sigmoid(adapter.gate.ban_logits(jnp.asarray(user)))
    parts = prompt_gates(model, adapter, args.prompt, np.tile(user, (len(args.prompt), 1)))
    found = []
    for prompt, gates, gate in zip(args.prompt, parts, np.asarray(combine(jnp.asarray(parts))), strict=True):
        print_on_main(f"{prompt}: {sentence(gates)}")
        by_category = dict(zip(CATEGORIES, (round(float(value), 4) for value in gates), strict=True))
        found.append({"prompt": prompt, "gate": round(float(gate), 4), "by_category": by_category})
    banned = dict(zip(CATEGORIES, (round(float(value), 4) for value in np.asarray(bans)[0]), strict=True))
    print(json.dumps({"user_bans": banned, "prompts": found}))
    return 0
