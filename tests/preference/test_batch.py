"""A batch's arrays: names, types, shapes and places, abstract and random."""

import jax
import numpy as np
from jax.sharding import PartitionSpec

from psa_jax.interop.diffusers import MODELS, load_stable_diffusion
from psa_jax.preference.batch import BatchSpec
from psa_jax.training.sharding import by_rows, make_mesh, replicated


def kinds(arrays):
    return {name: (array.shape, np.dtype(array.dtype)) for name, array in arrays.items()}


def test_random_and_abstract_agree(small_pipeline):
    spec = BatchSpec.of_model(small_pipeline[1], 5, fixed_draws=True)
    made = spec.random(6, 64, seed=1)
    assert kinds(made) == kinds(spec.abstract(6, 64))
    assert np.array_equal(made["row"], np.arange(6)) and not made["swapped"].any()
    assert made["input_ids"].min() >= 0 and made["input_ids"].max() < small_pipeline[1].text_encoder.config.vocab_size
    again, other = spec.random(6, 64, seed=1), spec.random(6, 64, seed=2)
    assert np.array_equal(made["chosen"], again["chosen"]) and not np.array_equal(made["chosen"], other["chosen"])


def test_sdxl_has_two_tokenizers_sizes_and_pooled_text(sdxl):
    model = load_stable_diffusion(sdxl[0], abstract=MODELS)
    spec = BatchSpec.of_model(model, 5)
    assert {"input_ids", "input_ids_2", "original_size", "crop"} <= spec.pair_columns.keys()
    assert list(spec.shared_columns) == ["empty_ids", "empty_ids_2"]
    cached = BatchSpec.of_model(model, 5, cached_text=True)
    first, second = (encoder.config for encoder in model.text_encoders)
    shapes = {name: array.shape for name, array in cached.abstract(2, 64).items()}
    assert "input_ids" not in shapes
    assert shapes["text_states"] == (2, 77, first.hidden_size + second.hidden_size)
    assert shapes["text_pooled"] == (2, second.projection_dim)
    assert shapes["empty_states"] == shapes["text_states"][1:] and shapes["empty_pooled"] == shapes["text_pooled"][1:]


def test_places(small_pipeline):
    spec, mesh = BatchSpec.of_model(small_pipeline[1], 5), make_mesh(2)
    places = spec.places(by_rows(mesh), replicated(mesh))
    batch = jax.device_put(spec.random(4, 32), places)
    assert batch["chosen"].sharding.spec == PartitionSpec(("data", "fsdp"))
    assert batch["empty_ids"].sharding.spec == PartitionSpec()
    abstract = spec.abstract(4, 32, places)
    assert all(abstract[name].sharding == array.sharding for name, array in batch.items())
