"""The embedded base model and the oracle: trained from pictures of SAGE-mini, and measured.

Phases: vae → denoiser → oracle → check. Each writes into the working folder and is skipped if its file exists. With
`pretrain.start`, an earlier base model, its VAE is kept and the denoiser goes on from its weights.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx
from jaxtyping import UInt8

from psa_jax.diffusion.generate import Generator
from psa_jax.diffusion.pixels import to_bytes
from psa_jax.diffusion.schedule import NoiseSchedule
from psa_jax.interop.diffusers import (
    StableDiffusion,
    load_stable_diffusion,
    load_vae,
    load_weights,
    save_stable_diffusion,
    save_weights,
)
from psa_jax.mini.oracle import Oracle, OracleNet, load_oracle, render_pairs, save_oracle, train_oracle
from psa_jax.mini.pretrain import PHASES, MiniSet, encode_all, json_log, train_denoiser, train_vae
from psa_jax.models.clip import CLIPText
from psa_jax.models.config import CLIPTextConfig, UNetConfig, VAEConfig
from psa_jax.models.unet import UNet
from psa_jax.models.vae import VAE
from psa_jax.progress import Progress, print_stage
from psa_jax.seeds import check_seed
from psa_jax.training.settings import validate

SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


def make_tokenizer(captions: list[str], length: int):
    """Trains a CLIP tokenizer on captions: every word of SAGE-mini becomes one token.

    Args:
      captions: training texts.
      length: tokens per prompt.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    clip = CLIPTokenizer()
    plain = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    plain.normalizer, plain.pre_tokenizer = clip.backend_tokenizer.normalizer, clip.backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=10_000, end_of_word_suffix="</w>", show_progress=False)
    plain.train_from_iterator(sorted(set(captions)), trainer)
    merges = [tuple(pair) for pair in json.loads(plain.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length)


def run_pretraining(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Runs the phases whose files are missing, writes base_model_metrics.json and prints most of it as JSON.

    Args:
      config: with the group `pretrain`.
      workdir: of all files; made if it is missing.

    Raises:
      PSAError: a mistake in the configuration, before any work.
    """
    validate(config, "pretrain", workdir)
    part, log = config.pretrain, json_log(workdir / "loss.jsonl")
    phases = (part.vae.crops, part.vae.whole, part.denoiser, part.restart, part.oracle)
    print_stage(
        f"vae, denoiser, oracle, check: up to {sum(phase.steps for phase in phases)} steps; finished phases are skipped"
    )
    train = MiniSet(part.pictures, part.data_seed)
    vae = _vae(part, workdir, train, log)
    model = _denoiser(part, workdir, vae, train, log)
    oracle = Oracle(_oracle(part, workdir, model.vae, log))

    report = {"scaling_factor": model.vae.config.scaling_factor, **check(model, oracle, part)}
    files = [*sorted((workdir / "model").rglob("*.safetensors")), workdir / "oracle.safetensors"]
    report["sha256"] = {str(f.relative_to(workdir)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    report["command"] = "psa-jax pretrain --config=configs/tiny.py --workdir=runs/tiny"
    report["config"] = part.to_dict()
    (workdir / "base_model_metrics.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in report.items() if k not in ("sha256", "config")}))


def _vae(part, workdir: Path, train: MiniSet, log) -> VAE:
    if part.start:
        return load_vae(Path(part.start))
    path = workdir / "vae.safetensors"
    widths = tuple(part.vae.widths)
    config = VAEConfig(block_out_channels=widths, layers_per_block=1, norm_num_groups=8, sample_size=64)
    if not path.exists():
        vae = train_vae(VAE(config, rngs=nnx.Rngs(check_seed(part.vae.crops.seed))), train.images, part.vae, log)
        save_weights(vae, path, dtype=np.float16)
    return load_weights(nnx.eval_shape(lambda: VAE(config, rngs=nnx.Rngs(0))), path)


def _oracle(part, workdir: Path, vae: VAE, log) -> OracleNet:
    path = workdir / "oracle.safetensors"
    if not path.exists():
        drawn = render_pairs(part.pictures // 2, part.data_seed + 2)
        # Half of what it learns from went through the VAE, as everything that it will judge.
        decoded = {name: roundtrip(vae, drawn[name][: part.oracle.decoded]) for name in ("images", "others")}
        decoded["labels"] = drawn["labels"][: part.oracle.decoded]
        data = {name: np.concatenate([drawn[name], decoded[name]]) for name in drawn}
        save_oracle(train_oracle(OracleNet(rngs=nnx.Rngs(check_seed(part.oracle.seed))), data, part.oracle, log), path)
    return load_oracle(path)


def roundtrip(vae: VAE, images: UInt8[np.ndarray, "n h w 3"]) -> UInt8[np.ndarray, "n h w 3"]:
    """Encodes and decodes pictures."""
    graph, params = nnx.split(vae, nnx.Param)
    decode = jax.jit(lambda params, moments: nnx.merge(graph, params).decode(jnp.split(moments, 2, axis=-1)[0]))
    pixels = [np.asarray(decode(params, moments)) for moments in encode_all(vae, images)]
    return to_bytes(np.concatenate(pixels))


def _denoiser(part, workdir: Path, vae: VAE, train: MiniSet, log) -> StableDiffusion:
    folder = workdir / "model"
    if not folder.exists():
        moments = np.concatenate(list(encode_all(vae, train.images)))
        mean, log_variance = np.split(moments, 2, axis=-1)
        # Latents of unit variance, as every Stable Diffusion has them.
        scale = float(1.0 / np.sqrt(np.var(mean) + np.mean(np.exp(log_variance))))
        vae.config = dataclasses.replace(vae.config, scaling_factor=round(scale, 5))
        tokenizer = make_tokenizer(train.captions, part.text.length)
        text = CLIPText(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=part.text.hidden_size,
                intermediate_size=4 * part.text.hidden_size,
                num_hidden_layers=part.text.layers,
                num_attention_heads=part.text.heads,
                max_position_embeddings=part.text.length,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            ),
            rngs=nnx.Rngs(check_seed(part.denoiser.seed)),
        )
        unet = UNet(
            UNetConfig(
                sample_size=16,
                block_out_channels=tuple(part.unet.widths),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                layers_per_block=1,
                cross_attention_dim=part.text.hidden_size,
                attention_head_dim=part.unet.heads,
                norm_num_groups=16,
            ),
            rngs=nnx.Rngs(check_seed(part.denoiser.seed + 1)),
        )
        if part.start:
            unet, text = _started(part.start, text, tokenizer)
        model = StableDiffusion(folder, unet, vae, text, tokenizer, SCHEDULER)
        unet, text = train_denoiser(
            unet,
            text,
            moments,
            model.tokenize(train.captions),
            model.tokenize([""])[0],
            vae.config.scaling_factor,
            NoiseSchedule.from_config(SCHEDULER),
            part,
            log,
            phases=PHASES[1:] if part.start else PHASES,
            keep=workdir / "checkpoints",
        )
        model = StableDiffusion(folder, unet, vae, text, tokenizer, SCHEDULER)
        save_stable_diffusion(model, folder, dtype=np.float16)
    return load_stable_diffusion(folder)


def _started(start: str, text: CLIPText, tokenizer: Any) -> tuple[UNet, CLIPText]:
    """UNet and text encoder of an earlier base model; tokens that it does not know keep the embeddings of `text`."""
    earlier = load_stable_diffusion(start)
    old, new = earlier.tokenizer.get_vocab(), tokenizer.get_vocab()
    kept = [token for token in new if token in old]
    found = earlier.text_encoder
    rows = found.embeddings.token_embedding.embedding[...][np.array([old[token] for token in kept])]
    tokens = text.embeddings.token_embedding.embedding
    tokens[...] = tokens[...].at[np.array([new[token] for token in kept])].set(rows)
    text.embeddings.position_embedding = found.embeddings.position_embedding
    text.encoder, text.final_layer_norm = found.encoder, found.final_layer_norm
    return earlier.unet, text


def check(model: StableDiffusion, oracle: Oracle, part: ml_collections.ConfigDict) -> dict[str, float]:
    """Measures the base model and the oracle.

    Args:
      model: the base model.
      oracle: reads pictures.
      part: the configuration's `pretrain` group.

    Returns:
      Percent: the oracle's accuracy on held-out pictures after the VAE (`oracle_*`), and how often pictures generated
      for held-out prompts show what the prompt names (`samples_*`).
    """
    print_stage(f"check: {part.held_out} pictures through the VAE, {part.samples} prompts generated")
    held_out = render_pairs(part.held_out, part.data_seed + 1)
    seen = oracle(roundtrip(model.vae, held_out["images"]))
    prompts = MiniSet(part.samples, part.data_seed + 3, "test_unseen")
    generator = Generator(model, steps=20, guidance=4.0)
    with Progress(part.samples, "picture", "generating") as progress:
        drawn = oracle(generator(prompts.captions, list(range(part.samples)), on_batch=progress.step))
    # Which of two pictograms is on which side is not in the prompt.
    shown = np.all(np.sort(drawn.pictograms) == np.sort(prompts.labels[:, :2]), axis=1)
    groups = {
        "two": np.array([prompt.scene.companion is not None for prompt in prompts.prompts]),
        "negated": np.array([prompt.absent is not None for prompt in prompts.prompts]),
    }
    hits = {
        "oracle_pictogram": seen.pictograms == held_out["labels"][:, :2],
        "oracle_subject": seen.subject == held_out["labels"][:, 2],
        "samples_pictogram": shown,
        **{f"samples_{name}": shown[members] for name, members in groups.items()},
        "samples_subject": drawn.subject == prompts.labels[:, 2],
    }
    return {name: round(100.0 * float(np.mean(hit)), 2) for name, hit in hits.items()}
