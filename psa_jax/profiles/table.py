"""The embedding table: user id → embedding, in one safetensors file. Personal data: mode 0600."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Float32
from safetensors.numpy import save as to_safetensors

from psa_jax.errors import PSAError
from psa_jax.files import write_private
from psa_jax.json_input import parse_json
from psa_jax.profiles.encoders import Encoder, fingerprints
from psa_jax.profiles.schema import UserProfile, check_user_id
from psa_jax.rules import quoted
from psa_jax.tensor_file import MAX_HEADER, read_float32, read_header

FORMAT = "psa_jax.embedding_table/1"
OWN_BANS_NOTE = "own_bans"
"""The note of a table some of whose users state bans of their own."""
# One key, because safetensors writes several in random order and equal tables must give equal files.
_METADATA_KEY = "psa_jax.embedding_table"
_METADATA_FIELDS = {"format", "ids", "encoder", "fingerprint", "notes", "mean", "std"}


@dataclass(frozen=True, eq=False, repr=False)
class EmbeddingTable:
    """Embeddings of known users.

    Args:
      ids: seven-digit user ids, each once.
      embeddings: [N, D], one row for each id, finite.
      encoder: name of the encoder that made them.
      fingerprint: the encoder's fingerprint; an adapter works only with the encoder that it was trained with.
      notes: further facts (pooling, template hash, origin).
      mean, std: [D], with which the embeddings were standardised; None if they are raw.

    Raises:
      PSAError: an argument is invalid.
    """

    ids: list[str]
    embeddings: Float32[np.ndarray, "n d"]
    encoder: str
    fingerprint: str
    notes: Mapping[str, str] = field(default_factory=dict)
    mean: Float32[np.ndarray, " d"] | None = None
    std: Float32[np.ndarray, " d"] | None = None

    def __post_init__(self) -> None:
        _check_matrix("embedding table", self.embeddings)
        if len(self.ids) != len(self.embeddings) or not self.ids:
            raise PSAError(f"embedding table: {len(self.ids)} ids for {len(self.embeddings)} rows; give one id a row")
        seen: set[str] = set()
        for user_id in self.ids:
            if check_user_id(user_id) in seen:
                raise PSAError(f"embedding table: user {user_id} is listed twice; keep one row a user")
            seen.add(user_id)
        finite = np.isfinite(self.embeddings).all(axis=1)  # [N]
        if not finite.all():
            user_id = self.ids[int(finite.argmin())]
            raise PSAError(f"embedding table: user {user_id} has NaN or infinity; encode it again")
        if (self.mean is None) != (self.std is None):
            raise PSAError("embedding table: mean and std go together; give both or neither")
        if self.mean is not None:
            for name, values in (("mean", self.mean), ("std", self.std)):
                if values.shape != (self.dim,) or values.dtype != np.float32 or not np.isfinite(values).all():
                    raise PSAError(f"embedding table: {name} must be {self.dim} finite float32 numbers")
            if not (self.std > 0).all():
                raise PSAError("embedding table: std must be above zero in every column")

    def __repr__(self) -> str:
        return f"EmbeddingTable({len(self.ids)} users, D={self.dim}, encoder={self.encoder!r})"

    @property
    def dim(self) -> int:
        """D, the length of an embedding."""
        return self.embeddings.shape[1]

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {user_id: row for row, user_id in enumerate(self.ids)}

    def lookup(self, ids: Sequence[str]) -> Float32[np.ndarray, "n d"]:
        """Embeddings of the given users, in the given order, as a copy; an id may repeat.

        Raises:
          PSAError: an id is not in the table; the message names the first one.
        """
        for user_id in ids:
            if user_id not in self._rows:
                meant, way_out = user_id.zfill(7), "add it with psa-jax encode USERS --add --out=TABLE"
                raise PSAError(
                    f"user {quoted(user_id)} is not in the embedding table of {len(self.ids)} users; "
                    f"{f'give {meant}' if meant in self._rows else way_out}"
                )
        return self.embeddings[np.asarray([self._rows[user_id] for user_id in ids], dtype=np.intp)]

    def standardised(self) -> "EmbeddingTable":
        """The table with every column scaled to mean 0 and standard deviation 1 over its users.

        Mean and standard deviation are kept, and `apply` uses them. A column that is the same for all users becomes 0;
        its std is recorded as 1.

        Raises:
          PSAError: already standardised, or fewer than two users.
        """
        if self.mean is not None:
            raise PSAError("embedding table: already standardised; start from the raw table")
        if len(self.ids) < 2:
            raise PSAError("embedding table: standardising needs at least two users")
        mean = self.embeddings.mean(axis=0, dtype=np.float64)
        std = self.embeddings.std(axis=0, dtype=np.float64)
        # Not `std == 0`: rounding of the mean leaves a constant column with a std of 1e-17 that would blow it up.
        constant = np.ptp(self.embeddings, axis=0) == 0
        mean32, std32 = mean.astype(np.float32), np.where(constant, 1.0, std).astype(np.float32)
        return replace(self, embeddings=_standardise(self.embeddings, mean32, std32), mean=mean32, std=std32)

    def apply(self, raw: Float32[np.ndarray, "n d"]) -> Float32[np.ndarray, "n d"]:
        """Brings raw embeddings of users who are not in the table to the table's scale.

        Args:
          raw: embeddings as the encoder gives them.

        Raises:
          PSAError: another D, or a number that is not finite.
        """
        _check_matrix("new embeddings", raw)
        if raw.shape[1] != self.dim:
            raise PSAError(f"new embeddings have D = {raw.shape[1]}, the table has D = {self.dim}; use one encoder")
        scaled = raw.copy() if self.mean is None else _standardise(raw, self.mean, self.std)
        if not np.isfinite(scaled).all():
            raise PSAError("new embeddings hold NaN or infinity; check the encoder")
        return scaled

    def without(self, *user_ids: str) -> "EmbeddingTable":
        """The table without the given users.

        Raises:
          PSAError: one of them is not in the table, or no user would be left.
        """
        for user_id in user_ids:
            if user_id not in self._rows:
                raise PSAError(
                    f"user {quoted(user_id)} is not in the embedding table: nothing is forgotten; check the ids"
                )
        kept = [row for row, user_id in enumerate(self.ids) if user_id not in user_ids]
        if not kept:
            raise PSAError("embedding table: no other user is in it; delete the file")
        return replace(self, ids=[self.ids[row] for row in kept], embeddings=self.embeddings[kept])

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """The fingerprints by which its encoder is known."""
        return fingerprints(self.fingerprint, self.notes)

    def check_encoder(self, encoder: Encoder) -> None:
        """Refuses an encoder other than the one that made this table, before hours of encoding.

        Raises:
          PSAError: it is another encoder.
        """
        self._check_encoder(encoder.name, fingerprints(encoder.fingerprint, encoder.notes))

    def _check_encoder(self, name: str, known: tuple[str, ...]) -> None:
        if not set(known) & set(self.fingerprints):
            raise PSAError(
                f"the new users are encoded by {name} ({known[0]}), those of the embedding table by {self.encoder} "
                f"({self.fingerprint}); use its encoder and settings"
            )

    def joined(self, others: "EmbeddingTable", *, update: bool = False) -> "EmbeddingTable":
        """The table with the users of another one appended, on its own scale.

        Args:
          others: a raw table of the same encoder.
          update: users in both tables get their embedding from `others`; otherwise they are an error.

        Raises:
          PSAError: another encoder or D, `others` is standardised, or a user is in both tables.
        """
        self._check_encoder(others.encoder, others.fingerprints)
        if others.mean is not None:
            raise PSAError("the new users are standardised on their own; give their raw embeddings")
        known = [user_id for user_id in others.ids if user_id in self._rows]
        if known and not update:
            raise PSAError(
                f"{len(known)} of the new users are in the embedding table already, such as {known[0]}; leave them "
                "out, or encode with --update to replace their embeddings"
            )
        rows = dict(zip(self.ids, self.embeddings, strict=True))
        rows |= zip(others.ids, self.apply(others.embeddings), strict=True)
        own = {name: text for name, text in others.notes.items() if name == OWN_BANS_NOTE}
        return replace(self, ids=list(rows), embeddings=np.stack(list(rows.values())), notes=dict(self.notes) | own)

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file with mode 0600, completely or not at all; equal tables give equal bytes.

        Raises:
          PSAError: the file cannot be written.
        """
        metadata = {
            "format": FORMAT,
            "ids": self.ids,
            "encoder": self.encoder,
            "fingerprint": self.fingerprint,
            "notes": dict(self.notes),
            # JSON preserves a float32: it is written with all the digits of its float64 value.
            "mean": None if self.mean is None else self.mean.tolist(),
            "std": None if self.std is None else self.std.tolist(),
        }
        tensors = {"embeddings": np.ascontiguousarray(self.embeddings)}
        write_private(path, to_safetensors(tensors, {_METADATA_KEY: json.dumps(metadata, sort_keys=True)}))

    @classmethod
    def load(cls, path: str | Path) -> "EmbeddingTable":
        """Reads a table that `save` wrote.

        Raises:
          PSAError: the file is missing, damaged or of another kind, or the table is invalid.
        """
        path = Path(path)
        header = read_header(path)
        text, entry = header.metadata.get(_METADATA_KEY), header.tensors.get("embeddings")
        if text is None or len(header.tensors) != 1 or entry is None or entry.dtype != "F32":
            raise PSAError(f"{path}: not an embedding table of psa_jax; give one that it saved")
        metadata = parse_json(text, f"{path}: its metadata", limit=MAX_HEADER, quote=False)
        embeddings = read_float32(path, "embeddings", entry, finite=False)  # a table says whose row it is
        if not _is_metadata(metadata):
            raise PSAError(f"{path}: its metadata is not that of {FORMAT}; write the table again")
        try:
            return cls(
                ids=metadata["ids"],
                embeddings=embeddings,
                encoder=metadata["encoder"],
                fingerprint=metadata["fingerprint"],
                notes=metadata["notes"],
                mean=None if metadata["mean"] is None else np.asarray(metadata["mean"], dtype=np.float32),
                std=None if metadata["std"] is None else np.asarray(metadata["std"], dtype=np.float32),
            )
        except PSAError as error:
            raise PSAError(f"{path}: {error}") from error

    @classmethod
    def from_profiles(cls, profiles: Sequence[UserProfile], encoder: Encoder) -> "EmbeddingTable":
        """Encodes users to a raw table.

        Args:
          profiles: with ids, each once.
          encoder: its name, fingerprint and notes are recorded.

        Raises:
          PSAError: a profile without an id, an id given twice, or an encoder that yields NaN.
        """
        ids = [check_user_id(profile.user_id) for profile in profiles]
        embeddings = encoder.encode(profiles)
        own = {OWN_BANS_NOTE: "some users"} if any(profile.bans for profile in profiles) else {}
        return cls(ids, embeddings, encoder.name, encoder.fingerprint, dict(encoder.notes) | own)

    @classmethod
    def from_npy_folder(cls, folder: str | Path, encoder: str = "upstream-npy") -> "EmbeddingTable":
        """Reads the torch original's folder of `<id>.npy` files, each (D,), (1, D) or (1, 1, D).

        Files of other kinds are ignored.

        Args:
          folder: with the files.
          encoder: a name for the model that made the arrays, which they do not record.

        Raises:
          PSAError: no such files, a name that is not an id, a pickle, a shape or D that differs, NaN.
        """
        paths = sorted(Path(folder).glob("*.npy"))
        if not paths:
            raise PSAError(f"{folder}: no .npy files there; expected one <id>.npy a user")
        vectors = [_read_vector(path) for path in paths]
        for path, vector in zip(paths, vectors, strict=True):
            if vector.shape != vectors[0].shape:
                raise PSAError(f"{path}: D = {vector.size}, but {paths[0].name} has D = {vectors[0].size}")
        dim = vectors[0].size
        return cls([path.stem for path in paths], np.stack(vectors), encoder, f"{encoder}-D{dim}", {"origin": "npy"})


def _standardise(
    raw: Float32[np.ndarray, "n d"], mean: Float32[np.ndarray, " d"], std: Float32[np.ndarray, " d"]
) -> Float32[np.ndarray, "n d"]:
    with np.errstate(over="ignore", invalid="ignore"):  # the callers refuse numbers that are not finite
        return (raw - mean) / std


def _check_matrix(what: str, values: object) -> None:
    if not isinstance(values, np.ndarray) or values.ndim != 2 or values.dtype != np.float32 or values.shape[1] < 1:
        found = f"{values.dtype} {list(values.shape)}" if isinstance(values, np.ndarray) else type(values).__name__
        raise PSAError(f"{what}: expected float32 [N, D], got {found}")


def _is_metadata(metadata: object) -> bool:
    """Whether the types are right; the values are checked by the table itself."""
    return (
        isinstance(metadata, dict)
        and metadata.keys() == _METADATA_FIELDS
        and metadata["format"] == FORMAT
        and isinstance(metadata["ids"], list)
        and all(isinstance(user_id, str) for user_id in metadata["ids"])
        and isinstance(metadata["encoder"], str)
        and isinstance(metadata["fingerprint"], str)
        and isinstance(metadata["notes"], dict)
        and all(isinstance(value, str) for value in metadata["notes"].values())
        and all(_is_numbers(metadata[name]) for name in ("mean", "std"))
    )


def _is_numbers(values: object) -> bool:
    return values is None or (isinstance(values, list) and all(isinstance(value, float) for value in values))


def _read_vector(path: Path) -> Float32[np.ndarray, " d"]:
    check_user_id(path.stem)
    try:
        # mmap: a header that claims more than the file holds is refused before any memory is taken
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise PSAError(f"{path}: not a plain .npy array ({error})") from error
    if not isinstance(array, np.ndarray) or not np.issubdtype(array.dtype, np.floating):
        raise PSAError(f"{path}: expected an array of floating-point numbers")
    if array.ndim not in (1, 2, 3) or array.shape[-1] < 1 or array.size != array.shape[-1]:
        raise PSAError(f"{path}: shape {array.shape}; expected (D,), (1, D) or (1, 1, D)")
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinity and is refused below
        vector = np.array(array, dtype=np.float32).reshape(-1)
    if not np.isfinite(vector).all():
        raise PSAError(f"{path}: NaN or infinity in it")
    return vector
