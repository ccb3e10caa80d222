"""Random Qwen2 models and small tokenizers of transformers, and the same models in JAX."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, trainers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Config as TorchConfig
from transformers import Qwen2ForCausalLM, Qwen2Tokenizer

from psa_jax.interop.qwen2 import qwen2_name
from psa_jax.interop.weights import abstract_model, load_weights
from psa_jax.models.qwen2 import Qwen2, Qwen2Config
from support.torch_models import randomise

QWENS = {
    "tied_groups": {  # two query heads to a key head, as in the small Qwen2.5 models
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    },
    "untied": {  # as many key heads as query heads
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-3,
    },
    "odd": {  # one key head; a width that its heads do not divide
        "hidden_size": 21,
        "intermediate_size": 37,
        "num_hidden_layers": 1,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    },
}
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def torch_qwen(name: str, vocab_size: int = 97, **settings) -> Qwen2ForCausalLM:
    config = {"vocab_size": vocab_size, "max_position_embeddings": 1024, "architectures": ["Qwen2ForCausalLM"]}
    config |= QWENS[name] | settings
    return randomise(Qwen2ForCausalLM(TorchConfig(**config, attn_implementation="eager")), seed=len(name))


def flax_qwen(theirs: Qwen2ForCausalLM, folder: Path, **settings) -> Qwen2:
    """The same model, through the folder that transformers writes."""
    theirs.save_pretrained(folder)
    config = Qwen2Config.from_json(json.loads((folder / "config.json").read_text()))
    return load_weights(abstract_model(Qwen2, config), folder / "model.safetensors", qwen2_name, **settings)


def small_qwen_tokenizer(texts: list[str], chat_template: str | None = None) -> Qwen2Tokenizer:
    """Qwen2's byte-level tokenizer with at most 200 merges learnt from `texts`."""
    letters = ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=len(letters) + 200, initial_alphabet=letters, show_progress=False)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = ByteLevel(add_prefix_space=False)
    bpe.train_from_iterator(texts, trainer)
    learnt = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(learnt["vocab"], [tuple(merge) for merge in learnt["merges"]], padding_side="left")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = chat_template
    return tokenizer


def save_qwen(folder: Path, name: str, texts: list[str], chat_template: str | None = None, **settings):
    """A whole random folder as transformers writes it; returns transformers' model and tokenizer."""
    tokenizer = small_qwen_tokenizer(texts, chat_template)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    theirs = torch_qwen(name, vocab_size=len(tokenizer) + 3, eos_token_id=end, **settings)
    theirs.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return theirs, tokenizer


def left_padded(lengths: list[int], length: int, vocab_size: int = 97) -> tuple[torch.Tensor, torch.Tensor]:
    """Random token ids, the last `lengths[i]` of row i valid, and the attention mask."""
    ids = torch.randint(0, vocab_size, (len(lengths), length), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(length)[None] >= length - torch.tensor(lengths)[:, None]
    return ids, mask.long()
