"""`load_psa`: an adapter in a pipeline of diffusers (SD1.x, SD2.x, SDXL; image to image and inpainting alike).

The pipeline stays as it is but for two things: its cross-attentions get processors (`UserProcessor`), and its
`encode_prompt` is followed by the adapter, which then knows the text states of both sides of guidance and works out
what the user adds to each layer, once for all steps. `torch.compile(pipe.unet)` sees tensors alone.
"""

import contextlib
import inspect
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from psa_jax.errors import PSAError
from psa_jax.interop.adapter_file import ADAPTER_FILE
from psa_jax.profiles.table import EmbeddingTable
from psa_jax.torch.adapter import Context, attach, cross_attentions
from psa_jax.torch.files import adapter_file, load_adapter

OLDEST_DIFFUSERS = (0, 35)
UNCONDITIONAL = ("off", "zeros", "same")

Users = str | Sequence[str] | np.ndarray | Tensor


@dataclass(frozen=True)
class _Request:
    """Who is drawn for in the call under way; `users` None: nobody, the base model draws."""

    users: Tensor | None
    scale: Tensor
    unconditional: str


def load_psa(
    pipe: DiffusionPipeline,
    adapter: str | Path,
    *,
    table: str | Path | EmbeddingTable | None = None,
    device: str | torch.device | None = None,
) -> "PSA":
    """Puts an adapter into a pipeline.

    Args:
      adapter: the native file that `psa-jax export` wrote, or a folder with it.
      table: embeddings of known users, for users by id.
      device: where the adapter is kept and works; None for where the pipeline runs.

    Raises:
      PSAError: a damaged file, an adapter or table that does not belong to the pipeline, diffusers too old.
    """
    version = tuple(int(part) for part in diffusers.__version__.split(".")[:2])
    if version < OLDEST_DIFFUSERS:
        oldest = ".".join(map(str, OLDEST_DIFFUSERS))
        raise PSAError(f"diffusers {diffusers.__version__} is too old; psa_jax.torch needs {oldest} or newer")
    unet = getattr(pipe, "unet", None)
    unet = getattr(unet, "_orig_mod", unet)  # inside torch.compile
    if not isinstance(unet, UNet2DConditionModel) or not hasattr(pipe, "encode_prompt"):
        raise PSAError(f"{type(pipe).__name__} is no pipeline of Stable Diffusion with a UNet2DConditionModel")
    if getattr(pipe, "psa", None) is not None:
        raise PSAError("the pipeline has a user adapter already; unload() that one first")
    if unet.encoder_hid_proj is not None:
        raise PSAError("the pipeline has an IP-Adapter in the same cross-attentions; unload_ip_adapter() first")
    path = adapter_file(adapter)
    attentions = list(cross_attentions(unet).values())
    for attention in attentions:
        if attention.norm_cross or attention.residual_connection or attention.rescale_output_factor != 1:
            raise PSAError(f"{type(pipe).__name__}: its cross-attentions are not those of Stable Diffusion")
    layers = tuple((attention.inner_dim, attention.heads) for attention in attentions)
    loaded, about = load_adapter(path, layers, unet.config.cross_attention_dim)
    if about.get("family", family(unet)) != family(unet):
        raise PSAError(f"{path}: the adapter is for {about['family']}, this pipeline is {family(unet)}")
    table = EmbeddingTable.load(table) if isinstance(table, (str, Path)) else table
    if table is not None:
        _check_table(path, about, loaded.config.user_dim, table)
    return PSA(pipe, unet, loaded, path, table, device)


def family(unet: UNet2DConditionModel) -> str:
    """ "sd1", "sd2" or "sdxl"."""
    if unet.config.addition_embed_type is not None:
        return "sdxl"
    return "sd2" if unet.config.use_linear_projection else "sd1"


def _check_table(path: Path, about: dict[str, Any], user_dim: int, table: EmbeddingTable) -> None:
    trained = about.get("encoder_fingerprint", table.fingerprint)
    if trained != table.fingerprint:
        raise PSAError(
            f"{path}: trained with the encoder {about.get('encoder')} ({trained}), the table was made by "
            f"{table.encoder} ({table.fingerprint}); encode the users again"
        )
    if about.get("standardised", table.mean is not None) != (table.mean is not None):
        raise PSAError(f"{path}: only one of adapter and table is standardised; give the table of its training")
    if table.dim != user_dim:
        raise PSAError(f"{path}: the adapter needs embeddings of {user_dim} numbers, the table has {table.dim}")


class PSA:
    """A pipeline that draws for users. Called as the pipeline is, with `user`, `scale` and `unconditional` more.

    Not for two threads at once.
    """

    def __init__(self, pipe, unet, adapter, path, table, device):
        self.pipe, self.adapter, self.table = pipe, adapter, table
        self._unet, self._path, self._device = unet, path, device
        self._request: _Request | None = None
        self._before = dict(unet.attn_processors)
        self._processors = [] if adapter.is_prompt else attach(unet)
        self._encode_prompt = pipe.encode_prompt
        self._signature = inspect.signature(pipe.encode_prompt)
        pipe.encode_prompt = self._encode  # an attribute of this pipeline that hides the method of its class
        pipe.psa = self

    def __call__(
        self,
        *args: Any,
        user: Users | None = None,
        scale: float | Sequence[float] | Tensor = 1.0,
        unconditional: str = "off",
        allow_unprotected: bool = False,
        **kwargs: Any,
    ) -> Any:
        """What the pipeline gives, for these users (see `applied`)."""
        with self.applied(user, scale=scale, unconditional=unconditional, allow_unprotected=allow_unprotected):
            return self.pipe(*args, **kwargs)

    @contextlib.contextmanager
    def applied(
        self,
        user: Users | None,
        *,
        scale: float | Sequence[float] | Tensor = 1.0,
        unconditional: str = "off",
        allow_unprotected: bool = False,
    ) -> Iterator[None]:
        """Within it, the pipeline itself draws for these users.

        Args:
          user: an id of the table or an embedding [D], or one for each prompt; one stands for all prompts.
          scale: strength s of the adapter, or one for each prompt; 0 is the base model.
          unconditional: what the adapter does on the unconditional side of guidance: "off", "zeros" (a user of zeros)
            or "same" (the user).
          allow_unprotected: with `user=None`, let the base model draw.

        Raises:
          PSAError: no user, an unknown one, a wrong number of them, or an embedding that is none.
        """
        if unconditional not in UNCONDITIONAL:
            raise PSAError(f"unconditional {unconditional!r} is unknown; use one of {', '.join(UNCONDITIONAL)}")
        if self._request is not None:
            raise PSAError("the pipeline is drawing for another user; wait until it is done")
        users = self._users(user, allow_unprotected)
        scales = torch.as_tensor(scale, dtype=torch.float32).reshape(-1)
        if not torch.isfinite(scales).all():
            raise PSAError("scale must be finite numbers")
        self._request = _Request(users, scales, unconditional)
        for processor in self._processors:
            processor.unprotected = users is None
        try:
            yield
        finally:
            self._request = None
            for processor in self._processors:
                processor.context, processor.unprotected = None, False

    def unload(self) -> None:
        """The pipeline as it was before."""
        self._unet.set_attn_processor(dict(self._before))
        del self.pipe.encode_prompt
        self.pipe.psa = None

    def save_pretrained(self, folder: str | Path, **kwargs: Any) -> None:
        """The base model in diffusers' layout, and the adapter beside it: `load_psa(pipe, folder)`.

        `kwargs` are those of the pipeline's own method, which may be used too: it leaves the adapter out.
        """
        self.pipe.save_pretrained(folder, **kwargs)
        target = Path(folder) / ADAPTER_FILE
        if not (target.exists() and target.samefile(self._path)):
            shutil.copyfile(self._path, target)

    def _users(self, user: Users | None, allow_unprotected: bool) -> Tensor | None:
        if user is None:
            if not allow_unprotected:
                raise PSAError("no user was given; give user=..., or allow_unprotected=True for the base model")
            return None
        if isinstance(user, str):
            user = [user]
        if not isinstance(user, (np.ndarray, Tensor)):
            if not user or not all(isinstance(one, str) for one in user):
                raise PSAError("user must be ids, or embeddings as one array or tensor [n, D]")
            if self.table is None:
                raise PSAError("users by id need load_psa(..., table=FILE)")
            user = self.table.lookup(user)
        users = torch.as_tensor(user).detach().to("cpu", torch.float32)
        users = users[None] if users.ndim == 1 else users
        wanted = self.adapter.config.user_dim
        if users.ndim != 2 or users.shape[1] != wanted or not len(users):
            raise PSAError(f"user embeddings have shape {tuple(users.shape)}, the adapter needs [n, {wanted}]")
        if not torch.isfinite(users).all():
            raise PSAError("a user embedding has NaN or infinity; encode the user again")
        return users

    @torch.no_grad()
    def _encode(self, *args: Any, **kwargs: Any) -> tuple:
        """The pipeline's `encode_prompt`, and after it the adapter."""
        request = self._request
        if request is None:
            raise PSAError("no user was given: call psa(prompt, user=...) and not the pipeline itself")
        encoded = self._encode_prompt(*args, **kwargs)
        if request.users is None:
            return encoded
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        images, guided = (bound.arguments[n] for n in ("num_images_per_prompt", "do_classifier_free_guidance"))
        with_prompt, without = encoded[:2]
        users, scale = self._rows(request, len(with_prompt), images, with_prompt.device)
        if guided:  # the unconditional side comes first
            users = torch.cat([torch.zeros_like(users) if request.unconditional == "zeros" else users, users])
            scale = torch.cat([torch.zeros_like(scale) if request.unconditional == "off" else scale, scale])
        text = torch.cat([without, with_prompt]) if guided else with_prompt
        made = self.adapter(text.to(users), users, scale)
        if isinstance(made, Tensor):
            made = made.to(text)
            return (*(made.chunk(2)[::-1] if guided else (made, without)), *encoded[2:])
        for processor, context in zip(self._processors, made, strict=True):
            ready = [None if part is None else part.to(text.device, self._unet.dtype) for part in context]
            processor.context = Context(*ready)
        return encoded

    def _rows(self, request: _Request, rows: int, images: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Users [rows, D] and scales [rows], where the adapter works: each prompt's for each of its images."""
        self.adapter.to(self._device or device)
        prompts, spread = rows // images, []
        for what, values in (("users", request.users), ("scales", request.scale)):
            if len(values) not in (1, prompts):
                raise PSAError(f"{len(values)} {what} for {prompts} prompts: give one, or one for each prompt")
            values = values.expand(prompts, *values.shape[1:]).repeat_interleave(images, dim=0)
            spread.append(values.to(self._device or device))
        return spread[0], spread[1]
