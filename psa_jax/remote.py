"""Buckets of Google Cloud Storage and S3: what is in them, copied here whole, and files put there whole.

The library is obstore (extra `remote`): one wheel that speaks both, with credentials and endpoint of the environment.
Its puts are atomic: nobody sees half an object. A folder in a bucket has no such moment, so a reader needs a marker
that is put last (`psa_jax.training.mirror`).
"""

import contextlib
import dataclasses
import datetime
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from psa_jax.errors import PSAError
from psa_jax.files import PRIVATE, replacing_folder
from psa_jax.paths import Address
from psa_jax.progress import Progress, print_on_main, print_stage

CACHE = "PSA_JAX_CACHE"
"""Environment variable: the folder of copies (default: psa_jax in XDG_CACHE_HOME or ~/.cache)."""
ADAPTER = "psa_adapter.safetensors"
"""The last file that a training leaves; a folder with it is one of a run."""
OF_THE_RUN_ALONE = ("checkpoints/", "reference/", "samples/", "tensorboard/", "wandb/")
"""Of such a folder, what only the run itself reads."""

_AT_ONCE = 8  # objects that are copied at the same time
_RETRIES = {"max_retries": 4, "retry_timeout": datetime.timedelta(seconds=60)}
_PART = 8 << 20  # bytes that are written in one go
_METADATA = "169.254.169.254"  # where machines of clouds ask for their credentials


@dataclasses.dataclass(frozen=True)
class Object:
    """One object.

    Attributes:
      name: below the key of the address; empty for the address itself.
      size: in bytes.
      version: etag, or the time of its last change where a service gives none.
    """

    name: str
    size: int
    version: str


class Bucket:
    """Reads and writes below one address; what goes wrong is one line that names it.

    Args:
      address: what all names are below.
      store: of obstore; that of the address by default.
    """

    def __init__(self, address: Address, store: Any = None):
        self.address = address
        self._store = open_store(address) if store is None else store

    def objects(self) -> list[Object]:
        """All objects below the address, by name; without those of size 0 by which services show folders.

        Raises:
          PSAError: the bucket refuses, is not there or does not answer; a name that is no path below the address.
        """
        import obstore

        with failures_named(self.address, "read"):
            listed = [entry for part in obstore.list(self._store, f"{self.address.key}/") for entry in part]
        found = [self._object(entry) for entry in listed]
        folders = {
            "/".join(each.name.split("/")[:depth]) for each in found for depth in range(each.name.count("/") + 1)
        }
        return sorted(
            (each for each in found if each.name and not (each.size == 0 and each.name in folders)),
            key=lambda each: each.name,
        )

    def itself(self) -> Object | None:
        """The object at the address; None where there is none."""
        import obstore

        with failures_named(self.address, "read"):
            try:
                return self._object(obstore.head(self._store, self.address.key))
            except _missing():
                return None

    def _object(self, entry: Mapping[str, Any]) -> Object:
        name = entry["path"][len(self.address.key) :].lstrip("/")
        if not name.isprintable() or "\\" in name or {"", ".", ".."} & set(name.split("/") if name else ()):
            raise PSAError(f"{self.address}: holds {name!a}, which is no path of plain names; rename it")
        return Object(name, entry["size"], entry["e_tag"] or entry["last_modified"].isoformat())

    def _key(self, name: str) -> str:
        return f"{self.address.key}/{name}" if name else self.address.key

    def read(self, name: str) -> bytes:
        """The content of an object."""
        import obstore

        with failures_named(self.address, "read"):
            return bytes(obstore.get(self._store, self._key(name)).bytes())

    def put(self, name: str, content: bytes | Path) -> None:
        """Writes an object, whole or not at all."""
        import obstore

        with failures_named(self.address, "written"):
            obstore.put(self._store, self._key(name), content)

    def remove(self, names: Iterable[str]) -> None:
        """Removes objects, one after the other; those that are not there are no mistake."""
        import obstore

        with failures_named(self.address, "written"):
            for name in names:
                with contextlib.suppress(*_missing()):
                    obstore.delete(self._store, self._key(name))

    def probe(self) -> None:
        """Writes a small object and removes it.

        Raises:
          PSAError: the bucket refuses, is not there or does not answer.
        """
        name = f".psa-jax-probe-{secrets.token_hex(4)}"
        self.put(name, b"psa-jax looks whether it may write here\n")
        self.remove([name])

    def download(self, objects: Iterable[Object], folder: Path, what: str) -> None:
        """Copies objects to files below a folder, their owner's alone, with a bar; refuses those that change meanwhile.

        Args:
          objects: of this bucket; the one without a name becomes the folder's path itself.
          folder: made if it is missing.
          what: the words before the bar.
        """
        wanted = list(objects)
        for parent in {(folder / each.name).parent for each in wanted}:
            parent.mkdir(parents=True, exist_ok=True)
        total = -(-sum(each.size for each in wanted) // 10**6)
        with Progress(total, "megabyte", what) as progress, ThreadPoolExecutor(_AT_ONCE) as pool:
            count = _Megabytes(progress)
            for _ in _in_time(pool, lambda each: self._download(each, folder / each.name, count), wanted):
                pass
            if total > count.shown:
                progress.step(total - count.shown)

    def _download(self, wanted: Object, path: Path, count: Callable[[int], None]) -> None:
        import obstore
        from obstore.exceptions import PreconditionError

        options = {"if_match": wanted.version} if wanted.version.startswith('"') else {}
        written = 0
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, PRIVATE), "wb") as file:
            with failures_named(self.address, "read"):
                try:
                    for part in obstore.get(self._store, self._key(wanted.name), options=options).stream(_PART):
                        written += file.write(part)
                        count(len(part))
                except PreconditionError:
                    written = -1
            file.flush()
            os.fsync(file.fileno())
        if written != wanted.size:
            raise PSAError(f"{self.address}: {wanted.name or 'it'} changed while it was copied; run again")

    def upload(self, files: Mapping[str, Path]) -> None:
        """Writes files as objects, each whole, several at the same time."""
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for _ in _in_time(pool, lambda item: self.put(item[0], item[1]), list(files.items())):
                pass


class _Megabytes:
    """Counts bytes of several threads and shows whole megabytes."""

    def __init__(self, progress: Progress):
        self._progress, self._done, self._lock = progress, 0, threading.Lock()
        self.shown = 0

    def __call__(self, size: int) -> None:
        with self._lock:
            self._done += size
            if self._done // 10**6 > self.shown:
                self._progress.step(self._done // 10**6 - self.shown)
                self.shown = self._done // 10**6


def _in_time(pool: ThreadPoolExecutor, do: Any, items: list) -> Iterator[Any]:
    """Results in order; after the first failure nothing more is begun."""
    running = [pool.submit(do, item) for item in items]
    try:
        for each in running:
            yield each.result()
    finally:
        for each in running:
            each.cancel()


def open_store(address: Address) -> Any:
    """The bucket of an address as obstore has it. Credentials, region and endpoint are those of the environment.

    Raises:
      PSAError: obstore is not installed, or the environment does not describe credentials.
    """
    try:
        from obstore.exceptions import BaseError
        from obstore.store import GCSStore, S3Store
    except ImportError as error:
        raise PSAError(f"{address}: needs obstore; pip install 'psa_jax[remote]'") from error
    options: dict[str, Any] = {"connect_timeout": "10s", "read_timeout": "60s", "timeout": "3600s"}
    given: dict[str, Any] = {}
    if address.scheme == "gs":
        kind, endpoint = GCSStore, os.environ.get("STORAGE_EMULATOR_HOST")
        if endpoint:  # as Google's own clients read it: an emulator, which asks for no credentials
            endpoint = endpoint if "://" in endpoint else f"http://{endpoint}"
            nobody = {"client_email": "", "private_key": "", "private_key_id": "", "disable_oauth": True}
            given = {"service_account_key": json.dumps(nobody | {"gcs_base_url": endpoint})}
    else:
        kind, endpoint = S3Store, os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        given = {"endpoint": endpoint} if endpoint else {}
    if endpoint and endpoint.startswith("http://"):
        options["allow_http"] = True
    try:
        return kind(address.bucket, client_options=options, retry_config=_RETRIES, **given)
    except (BaseError, ValueError) as error:
        raise PSAError(
            f"{address}: cannot be used ({_reason(error)}); correct the environment's credentials"
        ) from error


def _missing() -> tuple[type[Exception], ...]:
    from obstore.exceptions import NotFoundError

    return (FileNotFoundError, NotFoundError)


@contextlib.contextmanager
def failures_named(address: Address, done: str) -> Iterator[None]:
    """Converts what obstore raises to an error of one line.

    Args:
      address: of what is used.
      done: read or written.
    """
    from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

    try:
        yield
    except (*_missing(), BaseError) as error:
        line, reason = _first_line(error), _reason(error)
        if "token request" in line or _METADATA in line:  # asked for in vain before the bucket was
            said = "the environment has no credentials for it"
        elif isinstance(error, (PermissionDeniedError, UnauthenticatedError)) or re.match("40[13]", reason):
            said = f"access is refused ({reason})"
        elif isinstance(error, _missing()) or reason.startswith("404"):
            raise PSAError(
                f"{address}: cannot be {done}: it is not there ({reason}); check bucket, key and region"
            ) from error
        else:
            raise PSAError(
                f"{address}: cannot be {done} ({reason}); check network and endpoint, and run again"
            ) from error
        raise PSAError(
            f"{address}: cannot be {done}: {said}; docs/training.md says where credentials are looked for"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].partition("<?xml")[0]


def _reason(error: BaseException) -> str:
    """The status, or the first line of obstore's text without queries, which may hold signatures or tokens."""
    line = re.sub(r"\?\S*", "", _first_line(error))
    status = re.search(r"status code: (\d{3}[\w ]*)", line)
    return status[1].strip() if status else line.rpartition(" - ")[2].strip().rstrip(":;,.")[:200]


def cache_place() -> Path | None:
    """Where copies belong: CACHE, or psa_jax in the user's cache; None for a user without a home."""
    given, general = os.environ.get(CACHE), os.environ.get("XDG_CACHE_HOME", "")
    if given:
        return Path(given).absolute()
    cache = Path(general) if general.startswith("/") else Path(os.path.expanduser("~"), ".cache")
    return cache / "psa_jax" if cache.is_absolute() else None


def cache_folder() -> Path:
    """Where copies are kept, readable by their owner alone; the user may remove it between runs.

    Raises:
      PSAError: it cannot be made.
    """
    folder = cache_place()
    if folder is None:
        raise PSAError(f"there is no home to keep copies in; set {CACHE} to a folder")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise PSAError(f"{folder}: cannot be made ({error.strerror}); set {CACHE} to a folder that can") from error
    return folder


@contextlib.contextmanager
def locked(path: Path, busy: str | None = None) -> Iterator[None]:
    """Holds a lock that the processes of this machine share; the system lets go of it when a process ends.

    Args:
      path: its file, in an existing folder.
      busy: what to say where another process has it (default: wait for it).

    Raises:
      PSAError: another process has it, where `busy` is given.
    """
    with open(os.open(path, os.O_RDWR | os.O_CREAT, PRIVATE), "rb+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if busy is None else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise PSAError(busy or "") from error
        yield


def fetch(address: Address) -> Path:
    """Copies an object, or all objects below an address, to this machine; a copy of the same version is used again.

    Processes of one machine copy once. The copy appears whole or not at all.

    Returns:
      The file or folder, which has the address' last name.

    Raises:
      PSAError: nothing is there, the bucket refuses or does not answer, the disk has no room.
    """
    bucket = Bucket(address)
    found, itself = bucket.objects(), bucket.itself()
    if itself is not None and not (itself.size == 0 and found):
        found = [itself]
    elif any(each.name == ADAPTER for each in found):
        found = [each for each in found if not each.name.startswith(OF_THE_RUN_ALONE)]
    if not found:
        raise PSAError(f"{address}: nothing is there; check the name")
    about = json.dumps([str(address), [dataclasses.astuple(each) for each in found]])
    copies = cache_folder() / "copies"
    copies.mkdir(mode=0o700, exist_ok=True)
    name = f"{address.bucket}-{hashlib.sha256(about.encode()).hexdigest()[:16]}"
    place = copies / name / address.name
    with locked(copies / f"{name}.lock"):
        if place.exists():
            print_on_main(f"{address}: its copy in {place.parent} is used, of the same version")
            return place
        size = require_room(address, found, copies)
        print_stage(f"copying {address} to {place.parent}", size)
        with replacing_folder(place.parent) as unfinished:
            unfinished.mkdir(mode=0o700)
            bucket.download(found, unfinished / address.name, "copying")
    return place


def require_room(address: Address, objects: Iterable[Object], folder: Path) -> str:
    """Refuses a disk that objects do not fit on; returns their size in words."""
    size, free = sum(each.size for each in objects), shutil.disk_usage(folder).free
    if size > free:
        raise PSAError(
            f"{address}: {size / 1e9:.1f} GB, and {folder} has room for {free / 1e9:.1f}; make room, or set {CACHE} to "
            "a folder on another disk"
        )
    return f"{size / 1e6:,.1f} MB"
