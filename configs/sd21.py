"""Stable Diffusion 2.1: the user adapter on SAGE at 768 px.

psa-jax encode USERS.csv --out=table.safetensors
psa-jax build SAGE_DIR --model=MODEL_DIR --resolution=768 --out=shards
psa-jax train --config=configs/sd21.py --config.model=MODEL_DIR --config.data.shards=shards \
    --config.data.table=table.safetensors --workdir=runs/sd21

MODEL_DIR is a folder of SD2.x in diffusers' layout (for a model of 512 px, --resolution=512), USERS.csv lists the users
of SAGE_DIR.

--config=configs/sd21.py:paper is the published adapter and recipe of SD1.5 (see configs/sd15.py); none was published
for SD2.x. --config=configs/sd21.py:dpo is preference learning of the kind text; :debug is ten steps of one
pair with held-out measures and checkpoints, :smoke three steps.

To expect: not measured. The default mode has the kind of adapter and of loss that configs/tiny.py was measured with;
its learning rate is untried on real weights. Time of a step: not measured; psa-jax memory tells its memory.
Sized for v5e:2x4, 8 chips: 192 pairs a step in 24 parts are one pair a chip and part, 4.2 GiB of a chip (psa-jax aot
--quick). The frozen UNet and text encoder have 1,206 million parameters, 2.41 GB in bfloat16. The adapter has 12.7
million.
"""

from . import common


def get_config(arg: str = ""):
    """See `common.experiment_config`."""
    return common.experiment_config(arg, batch_size=192, optimizer="adamw", accumulate=24)
