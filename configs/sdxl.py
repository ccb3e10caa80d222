"""Stable Diffusion XL: the user adapter on SAGE at 1024 px.

psa-jax encode USERS.csv --out=table.safetensors
psa-jax build SAGE_DIR --model=MODEL_DIR --resolution=1024 --out=shards
psa-jax train --config=configs/sdxl.py --config.model=MODEL_DIR --config.data.shards=shards \
    --config.data.table=table.safetensors --workdir=runs/sdxl

MODEL_DIR is a folder of SDXL base in diffusers' layout, USERS.csv lists the users of SAGE_DIR.

--config=configs/sdxl.py:paper repeats the published adapter and recipe: 128 pairs a step, Adafactor with weight decay
1e-2, learning rate 5e-6 constant after 500 warm-up steps, 5,000 steps, β 5000, no SFT term, text dropout 0.2, clipping
at 1. Only timesteps are drawn otherwise: spread evenly over each batch. Users were embedded by Qwen2.5-7B there:
psa-jax encode USERS.csv --encoder=qwen --model=QWEN_DIR --out=qwen.safetensors
--config=configs/sdxl.py:dpo is preference learning of the kind text; :debug is ten steps of one
pair with held-out measures and checkpoints, :smoke three steps.

To expect: not measured. The default mode has the kind of adapter and of loss that configs/tiny.py was measured with;
its learning rate is untried on real weights. A step of :dpo with 4 pairs on one H100, random weights: 0.53 s and 41.1
GB (psa-jax bench step --pairs=4); the default looks at one picture of a pair and was not measured.
Sized for v5e:2x4, 8 chips: 128 pairs a step in 16 parts are one pair a chip and part. No weight is divided: the default
takes 14.6 of a chip's 15.75 GiB (psa-jax aot --quick). :dpo looks at both pictures and takes 12.1 GiB in parts of one
pair a chip with --config.mesh.fsdp=8 --config.remat=kernels: the adapter and its optimizer divided over eight chips.
The memory on other devices is told by psa-jax memory. The frozen UNet and text encoders have 3,385
million parameters, 6.77 GB in bfloat16. The adapter has 63.7 million, 13.1 of them for the pooled
text, which SDXL's UNet reads beside the cross-attentions (adapter.pooled).
"""

from . import common


def get_config(arg: str = ""):
    """See `common.experiment_config`."""
    return common.experiment_config(arg, batch_size=128, optimizer="adafactor", accumulate=16, pooled=True)
