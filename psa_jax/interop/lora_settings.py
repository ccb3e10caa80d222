"""peft's configuration of a LoRA: the settings that decide each layer's scale, and those that are refused.

It is `adapter_config.json` in a folder of peft, and `lora_adapter_metadata` in a file of diffusers. Patterns in it are
regular expressions in peft. Here only names of layers, or ends of them, are accepted: nothing from a file is executed
as a regular expression.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from psa_jax.errors import PSAError

# Options whose update is not (alpha / r) · B A, or which change more than weights. Empty values switch them off.
_REFUSED = (
    "use_dora",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "modules_to_save",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
)
# Initializations that leave the base weights as they are. Others (PiSSA, OLoRA, LoftQ, …) change them on loading.
_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
MERGE_ELSEWHERE = "merge it into the base model with its own library, and give that model"
_NAME = re.compile(r"\^?[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_MAX_RANK = 1 << 16


@dataclasses.dataclass(frozen=True)
class Settings:
    """Rank and alpha of a LoRA's layers.

    Attributes:
      where: the file, for errors.
      rank, alpha: of layers without an entry in `ranks` or `alphas`.
      ranks, alphas: end of a layer's name, or `^` and the whole name -> its own value. The first match counts.
      rslora: divide alpha by the square root of the rank (arXiv 2312.03732).
    """

    where: str
    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    rslora: bool

    def factor(self, layer: str, rank: int) -> float:
        """Factor alpha / r of a layer's update, or alpha / √r with `rslora`.

        Args:
          layer: its name in the model, without `text_model.`.
          rank: r, of its tensors.

        Raises:
          PSAError: the tensors have another rank.
        """
        expected = _matching(self.ranks, layer, self.rank)
        if rank != expected:
            raise PSAError(f"{self.where}: says rank {expected} for {layer}, whose tensors have {rank}; get both again")
        return _matching(self.alphas, layer, self.alpha) / (math.sqrt(rank) if self.rslora else rank)


def _matching(values: Mapping[str, Any], layer: str, default: Any) -> Any:
    for name, value in values.items():
        if layer == name.removeprefix("^") or layer.endswith(f".{name}"):
            return value
    return default


def read_settings(values: Mapping[str, Any], where: str) -> Settings:
    """Settings of peft's configuration. Unknown keys are ignored, as in peft.

    Args:
      values: its content.
      where: names it in errors.

    Raises:
      PSAError: another method than LoRA, a pattern that is no name, or a value of another type.
    """
    if (method := values.get("peft_type", "LORA")) != "LORA":
        raise PSAError(f"{where}: peft_type is {_quoted(method)}; only LORA can be merged here; {MERGE_ELSEWHERE}")
    for key in _REFUSED:
        if values.get(key):
            raise PSAError(f"{where}: {key} = {_quoted(values[key])} is not supported; {MERGE_ELSEWHERE}")
    if (bias := values.get("bias")) not in (None, "none"):
        raise PSAError(f"{where}: bias = {_quoted(bias)} is not supported; {MERGE_ELSEWHERE}")
    start = values.get("init_lora_weights")
    if not any(start is known for known in _STARTS[:3]) and start not in _STARTS[3:]:
        raise PSAError(
            f"{where}: init_lora_weights = {_quoted(start)} changes the base model on loading and is not supported; "
            f"{MERGE_ELSEWHERE}"
        )
    rslora = values.get("use_rslora")
    if rslora is not None and not isinstance(rslora, bool):
        raise PSAError(f"{where}: use_rslora = {_quoted(rslora)} is neither true nor false")
    rank = values.get("r")
    return Settings(
        where=where,
        rank=8 if rank is None else _rank(rank, f"{where}: r"),  # 8: peft's own default, of alpha too
        alpha=8.0 if values.get("lora_alpha") is None else _number(values["lora_alpha"], f"{where}: lora_alpha"),
        ranks={name: _rank(value, f"{where}: {name}") for name, value in _patterns(values, "rank_pattern", where)},
        alphas={name: _number(value, f"{where}: {name}") for name, value in _patterns(values, "alpha_pattern", where)},
        rslora=bool(rslora),
    )


def _patterns(values: Mapping[str, Any], key: str, where: str) -> list[tuple[str, Any]]:
    table = values.get(key)
    if table is None:
        return []
    if not isinstance(table, Mapping):
        raise PSAError(f"{where}: {key} is {_quoted(table)}, no object of names and numbers")
    for name in table:
        if not _NAME.fullmatch(name):
            raise PSAError(
                f"{where}: {key} holds the pattern {_quoted(name)}; only names of layers, or ends of them, are taken: "
                "write the layers out"
            )
    # Names of CLIP's layers have no such prefix here; transformers dropped it in 5.6.
    return [(re.sub(r"^(\^?)text_model\.", r"\1", name), value) for name, value in table.items()]


def _rank(value: Any, what: str) -> int:
    if type(value) is not int or not 0 < value < _MAX_RANK:
        raise PSAError(f"{what} is {_quoted(value)}, no rank (a whole number above zero)")
    return value


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
        raise PSAError(f"{what} is {_quoted(value)}, no alpha (a finite number)")
    return float(value)


def _quoted(value: Any) -> str:
    """The start of a value, in one line."""
    return ascii(value)[:60]
