"""Random CLIP models of transformers, with their processor and a small tokenizer: the independent side."""

from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from support.torch_models import small_tokenizer

VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}
LARGE_14 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
}
HUGE_14 = LARGE_14 | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "hidden_act": "gelu",
}


def save_clip(folder: Path, vision: dict = VISION, width: int = 24, seed: int = 0) -> CLIPModel:
    """Writes a random CLIP model, and returns it."""
    torch.manual_seed(seed)
    tokenizer = small_tokenizer(folder.parent / "clip_tokenizer")
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 20,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 77,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "projection_dim": 7,  # of no effect in a whole CLIP
    }
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=width)).eval()
    for parameter in model.parameters():  # zeros and ones of a new model would hide what is swapped
        parameter.data += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    side = vision["image_size"]
    CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=side).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model
