"""Stable Diffusion 1.5: the user adapter on SAGE at 512 px.

psa-jax encode USERS.csv --out=table.safetensors
psa-jax build SAGE_DIR --model=MODEL_DIR --resolution=512 --out=shards
psa-jax train --config=configs/sd15.py --config.model=MODEL_DIR --config.data.shards=shards \
    --config.data.table=table.safetensors --workdir=runs/sd15

MODEL_DIR is a folder of SD1.x in diffusers' layout, USERS.csv lists the users of SAGE_DIR.

--config=configs/sd15.py:paper repeats the published adapter and recipe: 192 pairs a step, AdamW with weight decay 1e-2,
learning rate 5e-6 constant after 500 warm-up steps, 5,000 steps, β 5000, no SFT term, text dropout 0.2, clipping at 1.
Only timesteps are drawn otherwise: spread evenly over each batch. Users were embedded by Qwen2.5-7B there:
psa-jax encode USERS.csv --encoder=qwen --model=QWEN_DIR --out=qwen.safetensors
--config=configs/sd15.py:dpo is preference learning of the kind text; :debug is ten steps of one
pair with held-out measures and checkpoints, :smoke three steps.

To expect: not measured. The default mode has the kind of adapter and of loss that configs/tiny.py was measured with;
its learning rate is untried on real weights. A step of :dpo with 8 pairs on one H100, random weights: 0.14 s and 10.1
GB (psa-jax bench step --pairs=8); the default looks at one picture of a pair: at 256 px, float32, on two CPU cores
2.1 s a pair where :dpo takes 4.0.
Sized for v5e:4x4, 16 chips: 192 pairs a step in 12 parts are one pair a chip and part. By the TPU compiler's estimate
with remat=none (psa-jax aot, docs/speed.md) the default is 44 ms a pair and 3.0 GiB of a chip: 0.52 s a step, 0.7 hours
for 5,000 steps; :dpo is 77 ms and 3.8 GiB, 1.3 hours. With accumulate=1 the default's 12 pairs a chip fit in 9.3 GiB.
The memory on other devices is told by psa-jax memory. The frozen UNet and text encoder have 982.6
million parameters, 1.97 GB in bfloat16. The adapter has 7.2 million.
"""

from . import common


def get_config(arg: str = ""):
    """See `common.experiment_config`."""
    return common.experiment_config(arg, batch_size=192, optimizer="adamw", accumulate=12)
