"""Measures of listed pictures by method, with intervals where there is one."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from psa_jax.errors import PSAError
from psa_jax.evaluation.clip_embeddings import ClipEmbeddings
from psa_jax.evaluation.embedder import Embedder
from psa_jax.evaluation.embedding_store import EmbeddingStore
from psa_jax.evaluation.judges.registry import MEASURES
from psa_jax.evaluation.manifest import Pictured
from psa_jax.evaluation.measures import DISTANCES, clip_scores, clustered_mean, cmmd_difference

_PICTURES = (".png", ".jpg", ".jpeg")
_WITH_DIFFERENCES = ("clip", "cmmd")


class _Embedded(NamedTuple):
    """Embeddings by one model: of each method's pictures, and of the reference, None where no distance is asked for."""

    methods: dict[str, Float[np.ndarray, "_ d"]]
    reference: Float[np.ndarray, "_ d"] | None


def measured(
    listed: Sequence[tuple[Path, Pictured]],
    names: Sequence[str],
    models: Mapping[str, Embedder],
    reference: Sequence[Path],
    folder: Path,
    baseline: str,
) -> dict[str, Any]:
    """Computes measures of every method's pictures. A picture that is listed for several users counts once.

    Args:
      listed: pictures with their paths.
      names: keys of `MEASURES`.
      models: those that the measures need, by their name in `MODELS`.
      reference: pictures that distances are taken to.
      folder: for embeddings.
      baseline: the method that others are compared with.

    Returns:
      By measure and method: `value`, `pictures`, and, where there is one, `interval` and the difference from the
      baseline on the prompts and seeds of both.

    Raises:
      PSAError: a picture that cannot be read, or CLIPScore of pictures whose prompts are not known.
    """
    methods: dict[str, dict[tuple[str, int, Path], Pictured]] = {}
    for path, each in listed:
        methods.setdefault(each.method, {}).setdefault((each.prompt_id, each.seed, path), each)
    paths = {method: [key[2] for key in found] for method, found in methods.items()}
    embedded = {name: _embedded(name, names, model, paths, reference, folder) for name, model in models.items()}
    weights = {name: model.weights for name, model in models.items()}
    result: dict[str, Any] = {"about": {"weights": weights, "reference": len(reference)}}
    for name in names:
        ours, far = embedded[MEASURES[name].model]
        scores = _scores(methods, ours, models["clip"]) if name == "clip" else {}
        result[name] = {}
        for method, found in methods.items():
            entry: dict[str, Any] = {"pictures": len(found)}
            if name == "clip":
                prompts = np.array([key[0] for key in found], str)
                entry |= {"value": float(scores[method].mean()), "prompts": len(set(prompts.tolist()))}
                if entry["prompts"] > 1:
                    entry["interval"] = clustered_mean(scores[method], prompts)[1:]
            else:
                entry["value"] = DISTANCES[name](ours[method], far)
            if method != baseline and baseline in methods and name in _WITH_DIFFERENCES:
                entry |= _less(name, method, baseline, methods, scores or ours, far)
            result[name][method] = entry
    return result


def _embedded(
    name: str,
    measures: Sequence[str],
    model: Embedder,
    paths: Mapping[str, Sequence[Path]],
    reference: Sequence[Path],
    folder: Path,
) -> _Embedded:
    """Embeddings that the measures of one model, which has this name, are taken of."""
    store = EmbeddingStore(folder, model)
    methods = {method: store.pictures(found, f"{method} by {name}") for method, found in paths.items()}
    far = any(MEASURES[each].model == name and each in DISTANCES for each in measures)
    return _Embedded(methods, store.pictures(reference, f"the reference by {name}") if far else None)


def reference_pictures(folder: Path) -> list[Path]:
    """The pictures of a folder that distances are taken to.

    Raises:
      PSAError: none in it.
    """
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _PICTURES and path.is_file())
    if not found:
        raise PSAError(f"{folder}: no PNG or JPEG in it; give --reference a folder of pictures")
    return found


def _scores(methods, embedded, clip: ClipEmbeddings) -> dict[str, Float[np.ndarray, " n"]]:
    texts = {each.prompt for found in methods.values() for each in found.values()}
    if "" in texts:
        raise PSAError("clip: pictures without a prompt; fill the column prompt of their manifest, or leave clip out")
    order = sorted(texts)
    of = dict(zip(order, clip.texts(order), strict=True))
    return {
        method: clip_scores(embedded[method], np.stack([of[each.prompt] for each in found.values()]))
        for method, found in methods.items()
    }


def _less(name: str, method: str, baseline: str, methods, values, far) -> dict[str, Any]:
    """The difference from the baseline on the prompts and seeds that both have, by a bootstrap over prompts."""
    first: dict[tuple[str, int], int] = {}
    for index, (prompt, seed, _) in enumerate(methods[baseline]):
        first.setdefault((prompt, seed), index)
    pairs = [(i, first[key[:2]], key[:2]) for i, key in enumerate(methods[method]) if key[:2] in first]
    if name != "clip":
        # A distance grows where pictures repeat: of a method that knows users one picture of each prompt and seed.
        pairs = list({key: (i, j, key) for i, j, key in reversed(pairs)}.values())
    prompts = np.array([key[0] for _, _, key in pairs], str)
    if len(set(prompts.tolist())) < 2:
        return {}
    ours, theirs = (values[each][[pair[side] for pair in pairs]] for side, each in enumerate((method, baseline)))
    found = clustered_mean(ours - theirs, prompts) if name == "clip" else cmmd_difference(ours, theirs, far, prompts)
    return {"less_baseline": found, "less_baseline_prompts": len(set(prompts.tolist()))}
