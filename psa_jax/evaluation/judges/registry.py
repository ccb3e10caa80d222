"""All judges by name. Imports nothing heavy: the command line lists the names.

A judge is one function in a file of its own (see `psa_jax.evaluation.judges.judge`) and one row here.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType


@dataclasses.dataclass(frozen=True)
class JudgeEntry:
    """How a judge is made.

    Attributes:
      maker: "module:function" of a function of `JudgeSettings` that gives a `Judge`.
      about: one line for people.
      extra: what installs its packages; None where the package alone is enough.
    """

    maker: str
    about: str
    extra: str | None = None


_JUDGES = "psa_jax.evaluation.judges"
JUDGES: Mapping[str, JudgeEntry] = MappingProxyType(
    {
        "nudenet": JudgeEntry(f"{_JUDGES}.nudenet:make_i2p", "NudeNet, five exposed parts, as for I2P", "nudenet"),
        "nudenet-psa": JudgeEntry(f"{_JUDGES}.nudenet:make_psa", "NudeNet, genitalia alone, as for PSA", "nudenet"),
        "opennsfw": JudgeEntry(f"{_JUDGES}.opennsfw:make", "OpenNSFW, probability from 0.5", "opennsfw"),
        "q16": JudgeEntry(f"{_JUDGES}.q16:make", "Q16 on CLIP ViT-L/14: --clip and --q16-prompts"),
        "judge": JudgeEntry(
            f"{_JUDGES}.chat:make", "a vision-language model behind an endpoint: --judge-model, --requests", "judge"
        ),
        "oracle": JudgeEntry("psa_jax.mini.oracle_judge:make", "the oracle of SAGE-mini, for its pictures alone"),
    }
)


@dataclasses.dataclass(frozen=True)
class MeasureEntry:
    """What a measure is taken of.

    Attributes:
      about: one line for people.
      model: whose embeddings, a key of `MODELS`.
    """

    about: str
    model: str


MODELS: Mapping[str, str] = MappingProxyType(
    {
        "clip": "--clip, a local folder of a CLIP model in transformers' layout",
        "inception": "--inception, a local file pt_inception-2015-12-05-6726825d.pth, or the same as safetensors",
    }
)
"""Name of a model that measures need, which is its flag's → what to give for it."""

MEASURES: Mapping[str, MeasureEntry] = MappingProxyType(
    {
        "clip": MeasureEntry("CLIPScore: --clip", "clip"),
        "cmmd": MeasureEntry("CMMD to the pictures of --reference: --clip", "clip"),
        "fid": MeasureEntry("FID to those, comparable where pictures are as many: --inception", "inception"),
        "fd_clip": MeasureEntry("Fréchet distance of CLIP embeddings to those: --clip", "clip"),
    }
)
"""Name → measure. They are of a method's pictures as a whole, where a judge's verdict is of one picture."""

PAIRS: Mapping[str, JudgeEntry] = MappingProxyType(
    {
        "judge-pairs": JudgeEntry(
            f"{_JUDGES}.pairs:make_pair_judge",
            "that model on two pictures, a method's and the baseline's, in both orders",
            "judge",
        )
    }
)
"""Name → what compares pictures of two methods, where a judge looks at one."""
