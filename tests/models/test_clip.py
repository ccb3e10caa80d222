"""The CLIP text encoder against transformers with random parameters."""

import jax.numpy as jnp
import pytest
import torch
from support.torch_models import CLIPS, TOLERANCE, difference, randomise, run, tensor, to_flax, torch_clip
from transformers import CLIPTextConfig as TorchConfig
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from psa_jax.models.clip import CLIPText, EncoderLayer
from psa_jax.models.config import CLIPTextConfig


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_layer(activation, tmp_path):
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 3, "hidden_act": activation}
    theirs = randomise(CLIPEncoderLayer(TorchConfig(**sizes, attn_implementation="eager")), seed=1)
    ours = to_flax(lambda r: EncoderLayer(CLIPTextConfig(**sizes), rngs=r), theirs, tmp_path)
    x = tensor(2, 7, 24)
    causal = torch.full((7, 7), -torch.inf).triu(1)[None, None]
    expected = theirs(x, attention_mask=causal)
    got = run(lambda m, x: m(x), ours, jnp.asarray(x.numpy()))
    assert difference(got, expected if torch.is_tensor(expected) else expected[0]) <= TOLERANCE


@pytest.mark.parametrize(("name", "length"), list(zip(CLIPS, (77, 11, 5, 9, 6), strict=True)))
def test_text_encoder(name, length, tmp_path):
    theirs = torch_clip(name)
    config = CLIPTextConfig.from_json(theirs.config.to_dict())
    ours = to_flax(lambda r: CLIPText(config, rngs=r), theirs, tmp_path)
    # Rows end at different places and are padded with the end token, as Stable Diffusion's tokenizer does.
    ids = torch.randint(3, 97, (3, length), generator=torch.Generator().manual_seed(0))
    ids[0, 2:], ids[1, -1], ids[2, 1:] = 98, 98, 98
    expected = theirs(ids, output_hidden_states=True)
    got = run(lambda m, i: m(i), ours, jnp.asarray(ids.numpy(), dtype=jnp.int32))

    assert difference(got.last, expected.last_hidden_state) <= TOLERANCE
    if config.projection_dim is None:
        assert difference(got.pooled, expected.pooler_output) <= TOLERANCE
        assert got.projected is None
    else:
        assert difference(got.projected, expected.text_embeds) <= TOLERANCE
    assert len(got.hidden) == config.num_hidden_layers + 1
    for ours_hidden, theirs_hidden in zip(got.hidden, expected.hidden_states, strict=True):
        assert difference(ours_hidden, theirs_hidden) <= TOLERANCE
