"""`load_psa`: an adapter in a pipeline of diffusers (SD1.x, SD2.x, SDXL; text to image, image to image, inpainting).

Two things of the pipeline change. Its cross-attentions get processors (`UserProcessor`). Its `encode_prompt` calls the
adapter at the end: there the text states of both sides of guidance are known, and the user's part of each layer is
computed once for all steps. `torch.compile(pipe.unet)` sees only tensors.

Before every `step` of the scheduler, `Installed` checks the processors. A step in which one of them did not run, or ran
with other text states, is an error, and the call returns no picture.
"""

import contextlib
import functools
import inspect
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor

from psa_jax.errors import PSAError
from psa_jax.interop.adapter_file import ADAPTER_FILE
from psa_jax.models.adapter_config import UNCONDITIONAL
from psa_jax.models.config import TIME_IDS, model_family
from psa_jax.profiles.own_bans import check_table_with_own_bans
from psa_jax.profiles.table import EmbeddingTable
from psa_jax.torch.adapter import Context, UserAdapter
from psa_jax.torch.files import adapter_file, load_adapter
from psa_jax.torch.pooled import PooledWatch
from psa_jax.torch.processors import AGAIN, NOBODY, cross_attentions, installed
from psa_jax.torch.request import EMBEDS, Request
from psa_jax.torch.users import Gates, Profiles, Users, bans_of, embeddings_of, profiles_encoded, scales_of

OLDEST_DIFFUSERS = (0, 35)
_ENCODES = {*EMBEDS[:2], "num_images_per_prompt", "do_classifier_free_guidance"}
"""Parameters that `encode_prompt` of Stable Diffusion's pipelines has."""


def load_psa(
    pipe: DiffusionPipeline,
    adapter: str | Path,
    *,
    table: str | Path | EmbeddingTable | None = None,
    device: str | torch.device | None = None,
) -> "PSA":
    """Puts an adapter into a pipeline.

    Args:
      pipe: of Stable Diffusion, with a UNet2DConditionModel.
      adapter: native file of `psa-jax export`, or a folder with it.
      table: embeddings of known users, for users by id.
      device: of the adapter; None for the pipeline's.

    Returns:
      The pipeline with the adapter; calls take users.

    Raises:
      PSAError: a damaged file, an adapter or table that does not fit the pipeline, or diffusers before 0.35.
    """
    version = tuple(int(part) for part in diffusers.__version__.split(".")[:2])
    if version < OLDEST_DIFFUSERS:
        oldest = ".".join(map(str, OLDEST_DIFFUSERS))
        raise PSAError(f"diffusers {diffusers.__version__} is too old; psa_jax.torch needs {oldest} or newer")
    unet = _unet(pipe)
    if not isinstance(unet, UNet2DConditionModel) or not hasattr(pipe, "encode_prompt"):
        raise PSAError(f"{type(pipe).__name__} is no pipeline of Stable Diffusion with a UNet2DConditionModel")
    if getattr(pipe, "psa", None) is not None:
        raise PSAError("the pipeline has a user adapter already; unload() that one first")
    if not inspect.signature(pipe.encode_prompt).parameters.keys() >= _ENCODES:
        raise PSAError(f"{type(pipe).__name__}: its encode_prompt is not that of Stable Diffusion")
    if unet.encoder_hid_proj is not None:
        raise PSAError("the pipeline has an IP-Adapter in the same cross-attentions; unload_ip_adapter() first")
    path = adapter_file(adapter)
    attentions = list(cross_attentions(unet).values())
    for attention in attentions:
        if attention.norm_cross or attention.residual_connection or attention.rescale_output_factor != 1:
            raise PSAError(f"{type(pipe).__name__}: its cross-attentions are not those of Stable Diffusion")
    reading = [m for m in unet.modules() if isinstance(m, Attention) and m.is_cross_attention]
    if {id(attention) for attention in reading} != {id(attention) for attention in attentions}:
        raise PSAError(f"{type(pipe).__name__}: its UNet reads the text in other places than Stable Diffusion's")
    layers = tuple((attention.inner_dim, attention.heads) for attention in attentions)
    loaded, about = load_adapter(path, layers, unet.config.cross_attention_dim)
    family = model_family(unet.config)
    if about.get("family", family) != family:
        raise PSAError(f"{path}: the adapter is for {about['family']}, this pipeline is {family}")
    _check_pooled(path, loaded.config.pooled, pipe, unet)
    table = EmbeddingTable.load(table) if isinstance(table, (str, Path)) else table
    if table is not None:
        _check_table(path, about, loaded.config.user_dim, table)
    return PSA(pipe, unet, loaded, path, about, table, device)


def _unet(pipe: DiffusionPipeline) -> torch.nn.Module | None:
    """UNet of a pipeline, without wrappers of torch.compile."""
    unet = getattr(pipe, "unet", None)
    while hasattr(unet, "_orig_mod"):  # it may be compiled twice
        unet = unet._orig_mod
    return unet


def _check_pooled(path: Path, width: int, pipe: DiffusionPipeline, unet: UNet2DConditionModel) -> None:
    """Raises PSAError for an adapter that edits a pooled text, and a pipeline without one of that width."""
    if not width:
        return
    config = unet.config
    if config.addition_embed_type != "text_time":
        raise PSAError(f"{path}: the adapter edits a pooled text of {width} numbers, which this pipeline has not")
    own = config.projection_class_embeddings_input_dim - TIME_IDS * config.addition_time_embed_dim
    if own != width:
        raise PSAError(f"{path}: the adapter edits a pooled text of {width} numbers, this pipeline's has {own}")
    if not inspect.signature(pipe.encode_prompt).parameters.keys() >= {*EMBEDS}:
        raise PSAError(f"{type(pipe).__name__}: its encode_prompt gives no pooled text, which the adapter edits")


def _check_table(path: Path, about: dict[str, Any], user_dim: int, table: EmbeddingTable) -> None:
    """Raises PSAError for a table that does not fit the adapter's metadata or its length of user embeddings."""
    trained = about.get("encoder_fingerprint", table.fingerprint)
    if trained not in table.fingerprints:
        raise PSAError(
            f"{path}: trained with the encoder {about.get('encoder')} ({trained}), the table was made by "
            f"{table.encoder} ({table.fingerprint}); encode the users again"
        )
    if about.get("standardised", table.mean is not None) != (table.mean is not None):
        raise PSAError(f"{path}: only one of adapter and table is standardised; give the table of its training")
    if table.dim != user_dim:
        raise PSAError(f"{path}: the adapter needs embeddings of {user_dim} numbers, the table has {table.dim}")
    check_table_with_own_bans(path, about, table)


class _Hidden:
    """An attribute set on an object that hides its class's attribute until `restore`."""

    def __init__(self, owner: object, name: str, value: Any):
        self.owner, self.name, self.value = owner, name, value
        self._before = vars(owner).get(name)
        setattr(owner, name, value)

    @property
    def holds(self) -> bool:
        """Whether the attribute is still in place; False if it was replaced."""
        return vars(self.owner).get(self.name) == self.value  # not `is`: a copied object has a bound method twice

    def restore(self) -> None:
        """Puts the attribute from before back, unless ours was replaced."""
        if not self.holds:
            return
        delattr(self.owner, self.name)
        if self._before is not None:
            setattr(self.owner, self.name, self._before)


class PSA:
    """Pipeline with a user adapter (`load_psa`). Calls take the pipeline's arguments, and users.

    One call at a time: calls of other threads are refused meanwhile.

    Attributes:
      pipe: the pipeline of diffusers.
      adapter: the adapter, in float32.
      table: embeddings of known users; None without a table.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        unet: torch.nn.Module,
        adapter: UserAdapter,
        path: Path,
        about: dict[str, Any],
        table: EmbeddingTable | None,
        device: str | torch.device | None,
    ):
        self.pipe, self.adapter, self.table = pipe, adapter, table
        self._path, self._about, self._device = path, about, device
        self._request: Request | None = None
        self._encode_prompt = pipe.encode_prompt
        self._signature = inspect.signature(pipe.encode_prompt)
        self._installed = installed(unet)
        self._installed.check()
        self._installed.add_pipeline(self)
        self._pooled = PooledWatch(unet, adapter.config.pooled) if adapter.config.pooled else None
        self._hook: _Hidden | None = _Hidden(pipe, "encode_prompt", self._encode)
        self._watched: _Hidden | None = None  # the scheduler's step
        pipe.psa = self

    def __getstate__(self) -> dict[str, Any]:
        """State of a copy. A copy made during a call does not take part in the call."""
        return vars(self) | {"_request": None}

    def __call__(
        self,
        *args: Any,
        user: Users | None = None,
        profile: Profiles | None = None,
        gates: Gates | None = None,
        scale: float | Sequence[float] | Tensor = 1.0,
        unconditional: str = "off",
        allow_unprotected: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Output of the pipeline for the given users.

        Args:
          args, kwargs: of the pipeline.
          user, profile, gates, scale, unconditional, allow_unprotected: as in `applied`.

        Raises:
          PSAError: as `applied`, or a call that did not use the adapter; its pictures are not returned.
        """
        options = {"scale": scale, "unconditional": unconditional, "allow_unprotected": allow_unprotected}
        with self.applied(user, profile=profile, gates=gates, **options):
            result = self.pipe(*args, **kwargs)
            if self._request.users is not None and not (self._request.steps and self._watches(self.pipe.scheduler)):
                raise PSAError("the pipeline did not use the steps of its own scheduler, so no step could be checked")
        return result

    @contextlib.contextmanager
    def applied(
        self,
        user: Users | None = None,
        *,
        profile: Profiles | None = None,
        gates: Gates | None = None,
        scale: float | Sequence[float] | Tensor = 1.0,
        unconditional: str = "off",
        allow_unprotected: bool = False,
    ) -> Iterator[None]:
        """Context in which calls of the pipeline itself generate for the given users.

        Args:
          user: an id of the table or an embedding [D] for all prompts, or one for each prompt.
          profile: in place of `user`, a profile such as `{"age": 9, "gender": "female"}` for all prompts, or one for
            each. For encoders that need no model of their own.
          gates: in place of `user`, what the user bans, from 0 to 1 for each category (`psa-jax export --format=gates`
            computes it on a device): a dict by category, or an array [7] or [n, 7]. For adapters with the gate by
            categories.
          scale: strength s of the adapter, for all prompts or for each; 0 is the base model.
          unconditional: adapter on the unconditional side of guidance: "off", "zeros" (an embedding of zeros) or
            "same" (the user's embedding).
          allow_unprotected: allows no user, for the base model.

        Raises:
          PSAError: no user, an unknown one, a wrong number of users, or an invalid embedding; an adapter that is no
            longer in the pipeline, or was left out of a step; a call of another pipeline.
        """
        if unconditional not in UNCONDITIONAL:
            raise PSAError(f"unconditional {unconditional!r} is unknown; use one of {', '.join(UNCONDITIONAL)}")
        if (outer := self._request) is not None:
            outer.used = True
        users = self._users(user, profile, gates, allow_unprotected)
        scales = scales_of(scale)
        self._installed.start()
        try:
            self._unwatch()  # a copy made during a call still has its watch
            self._check()
            request = self._request = Request(users, scales, unconditional, by_bans=gates is not None)
            if users is None:
                self._installed.leave_unprotected()
            yield
            if users is not None:
                self._finish(request)
        finally:
            self._request = None
            self._unwatch()
            self._installed.end()

    def unload(self) -> None:
        """Takes the adapter out of the pipeline. A second call does nothing."""
        if self._hook is None:
            return
        self._hook.restore()
        self._hook = None
        if self._pooled is not None:
            self._pooled.remove()
        self._installed.remove_pipeline(self)
        self.pipe.psa = None

    def save_pretrained(self, folder: str | Path, **kwargs: Any) -> None:
        """Writes the base model in diffusers' layout with the adapter beside it, for `load_psa(pipe, folder)`.

        The pipeline's own method writes the base model alone.

        Args:
          folder: to write.
          kwargs: of the pipeline's own method.
        """
        self.pipe.save_pretrained(folder, **kwargs)
        target = Path(folder) / ADAPTER_FILE
        if not (target.exists() and target.samefile(self._path)):
            shutil.copyfile(self._path, target)

    def _users(
        self, user: Users | None, profile: Profiles | None, gates: Gates | None, allow_unprotected: bool
    ) -> Tensor | None:
        """Embeddings [n, D], or what users ban [n, 7], in float32 on the CPU; None without a user."""
        given = [name for name, value in (("user", user), ("profile", profile), ("gates", gates)) if value is not None]
        if len(given) > 1:
            raise PSAError(f"give either {'=... or '.join(given)}=..., not both")
        if not given:
            if not allow_unprotected:
                raise PSAError("no user was given; give user=..., or allow_unprotected=True for the base model")
            return None
        if gates is not None:
            return bans_of(gates, self.adapter.config)
        if profile is not None:
            user = profiles_encoded(profile, self._path, self._about, self.table)
        return embeddings_of(user, self.adapter.config, self.table)

    def _check(self) -> None:
        """Raises PSAError if the adapter is not in its place in the pipeline."""
        if self._hook is None:
            raise PSAError("the adapter was taken out by unload(); call load_psa again")
        if _unet(self.pipe) is not self._installed.unet:
            raise PSAError(f"pipe.unet is another UNet now, without the user's adapter; {AGAIN}")
        if not self._hook.holds:
            raise PSAError(f"pipe.encode_prompt was replaced, and with it the call of the user's adapter; {AGAIN}")
        self._installed.add_pipeline(self)  # a copied pipeline is not yet known to its copied UNet
        self._installed.check()

    def uses_unet(self, unet: torch.nn.Module) -> bool:
        """Whether the adapter is loaded and `unet` is the pipeline's UNet."""
        return self._hook is not None and _unet(self.pipe) is unet

    def _check_steps(self, request: Request) -> None:
        """Raises PSAError if the UNet ran since the last check with other text states, also for another pipeline."""
        if request.text is not None and self._installed.were_run():
            self._check_run(request)

    def _check_run(self, request: Request) -> None:
        self._installed.check_run(request.text)
        if self._pooled is not None:
            self._pooled.check_run(request.pooled)

    def _finish(self, request: Request) -> None:
        """Raises PSAError if pictures generated in `applied` were not generated for its users."""
        self._check()
        if not request.used:
            raise PSAError("this pipeline was not called; applied() works for the pipeline given to load_psa alone")
        if request.steps and not self._watches(self.pipe.scheduler):
            raise PSAError(
                "the pipeline's scheduler was replaced during the call, so the later steps could not be checked"
            )
        self._check_steps(request)  # of loops that call the UNet themselves

    def _watch(self, request: Request) -> None:
        """Checks the processors before every following step of the scheduler."""
        scheduler = self.pipe.scheduler
        if self._watches(scheduler):
            return
        self._unwatch()
        step = scheduler.step

        @functools.wraps(step)  # pipelines look at its parameters
        def watched(*args: Any, **kwargs: Any) -> Any:
            self._check_run(request)
            request.steps += 1
            predicted = args[0] if args else kwargs["model_output"]
            if not torch.isfinite(predicted).all():
                raise PSAError(
                    "the UNet's prediction is not finite, and no picture is returned: use bfloat16 or float32 in "
                    "place of float16, or a smaller scale"
                )
            return step(*args, **kwargs)

        self._watched = _Hidden(scheduler, "step", watched)

    def _watches(self, scheduler: object) -> bool:
        return self._watched is not None and self._watched.owner is scheduler and self._watched.holds

    def _unwatch(self) -> None:
        if self._watched is not None:
            self._watched.restore()
        self._watched = None

    @torch.no_grad()
    def _encode(self, *args: Any, **kwargs: Any) -> tuple:
        """The pipeline's `encode_prompt`, followed by the adapter. Arguments and result are the pipeline's."""
        request = self._request
        if request is None:
            raise PSAError(NOBODY)
        request.used = True
        encoded = self._encode_prompt(*args, **kwargs)
        if request.users is None:
            return encoded
        self._check_steps(request)  # before `request.text` is replaced
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        images, guided = (bound.arguments[n] for n in ("num_images_per_prompt", "do_classifier_free_guidance"))
        sides = (1, 0) if guided else (0,)  # in the order of EMBEDS; the unconditional side comes first
        users, scale = self._rows(request, len(encoded[0]), images, encoded[0].device)
        if guided:
            users = torch.cat([torch.zeros_like(users) if request.unconditional == "zeros" else users, users])
            scale = torch.cat([torch.zeros_like(scale) if request.unconditional == "off" else scale, scale])
        joined = self._joined(encoded, sides)
        adapt = self.adapter.edit if request.by_bans else self.adapter
        made = adapt(joined[0].to(users), users, scale, *(one.to(users) for one in joined[1:]))
        if self.adapter.is_prompt:
            made = (made,) if isinstance(made, Tensor) else made
            encoded = request.with_edits(encoded, sides, made, scale, bound.arguments)
            joined = self._joined(encoded, sides)
            made = [Context()] * self._installed.count
        text, *pooled = joined
        ready = [[None if p is None else p.to(text.device, self._installed.unet.dtype) for p in one] for one in made]
        self._installed.begin([Context(*parts) for parts in ready])
        request.text, request.pooled = text, pooled[0] if pooled else None
        if self._pooled is not None:
            self._pooled.seen = None
        self._watch(request)
        return encoded

    def _joined(self, encoded: tuple, sides: tuple[int, ...]) -> list[Tensor]:
        """Text states of all sides and, where the adapter edits it, their pooled text."""
        return [torch.cat([encoded[side + start] for side in sides]) for start in (0, 2)[: 1 + bool(self._pooled)]]

    def _rows(self, request: Request, rows: int, images: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Users [rows, D] and scales [rows] on the adapter's device: those of a prompt for each of its images."""
        self.adapter.to(self._device or device)
        prompts, spread = rows // images, []
        for what, values in (("users", request.users), ("scales", request.scale)):
            if len(values) not in (1, prompts):
                raise PSAError(f"{len(values)} {what} for {prompts} prompts: give one, or one for each prompt")
            values = values.expand(prompts, *values.shape[1:]).repeat_interleave(images, dim=0)
            spread.append(values.to(self._device or device))
        return spread[0], spread[1]
