"""A working folder in a bucket: a run writes to this machine's disk, and what it leaves is copied to the bucket.

The bucket is what counts: at its start a run takes from there what is whole. A checkpoint counts with its marker, which
is put after all of its files and removed before the first of them, so that nobody takes half of one.
"""

import contextlib
import hashlib
import json
import secrets
import shutil
from pathlib import Path
from types import TracebackType

import jax

from psa_jax.errors import PeerLost, PSAError
from psa_jax.paths import Address
from psa_jax.progress import print_on_main, print_stage
from psa_jax.remote import ADAPTER, Bucket, Object, cache_folder, locked, require_room
from psa_jax.training.distributed import any_process, by_main_process, is_main_process, wait_for_all

MARKER = "whole.json"
"""The last object of a checkpoint, which lists the others; Orbax' own marker, which is on the disk, is among them."""
CHECKPOINTS = "checkpoints"
NOT_MIRRORED = ("data", "wandb")
"""Folders that stay on this machine: SAGE-mini is drawn again, Weights & Biases has its own copy."""
_TOKEN = "mirror"  # a file beside the folder, with a number of the run whose folder it is


class Mirror:
    """Context: the local folder of a run whose working folder is in a bucket. All processes of a group enter it.

    Process 0 alone reads and writes the bucket. The others need not see its disk: each machine has a folder of its own,
    for what every host draws again (SAGE-mini).

    Args:
      address: of the working folder.

    Attributes:
      folder: where the run writes; empty, but for what the bucket has, once the context is entered.
    """

    def __init__(self, address: Address):
        self.address = address
        digest = hashlib.sha256(str(address).encode()).hexdigest()[:16]
        self._home = cache_folder() / "runs" / f"{address.bucket}-{digest}"
        self.folder = self._home / address.name
        self._sent: dict[str, tuple[int, int]] = {}  # file -> size and time of what the bucket has
        self._steps: set[int] = set()  # checkpoints that are whole in the bucket
        self._held = contextlib.ExitStack()
        self._bucket: Bucket | None = None

    def __enter__(self) -> "Mirror":
        """Tries whether the bucket can be written, and takes from it what an earlier run left.

        Raises:
          PSAError: it cannot, or another run of this machine writes there.
        """
        failed = None
        if is_main_process():
            try:
                self._open()
            except PSAError as error:
                failed = error
        if jax.process_count() > 1:
            wait_for_all("mirror")  # for as long as it takes; a collective would not

        def outcome() -> int:
            if failed is not None:
                raise failed
            return secrets.randbits(31)

        self._clear(by_main_process(outcome))
        return self

    def _open(self) -> None:
        self._home.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._held.enter_context(
            locked(self._home / "lock", f"{self.address}: another run on this machine writes there; wait for its end")
        )
        self._bucket = Bucket(self.address)
        self._bucket.probe()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(mode=0o700)
        self._take()

    def _clear(self, run: int) -> None:
        """Empties the folder of a machine on which process 0 is not, once for all processes there.

        Args:
          run: a number that no other run has.
        """
        token = self._home / _TOKEN
        if is_main_process():
            token.write_text(str(run), encoding="utf-8")
        if jax.process_count() == 1:
            return
        any_process(False)  # the others wait
        self._home.mkdir(mode=0o700, parents=True, exist_ok=True)
        with locked(self._home / "clearing"):
            if not token.is_file() or token.read_text(encoding="utf-8") != str(run):
                shutil.rmtree(self.folder, ignore_errors=True)
                self.folder.mkdir(mode=0o700)
                token.write_text(str(run), encoding="utf-8")

    def _take(self) -> None:
        """Copies logs and whole checkpoints here; removes from the bucket what a killed copying left of others."""
        found = {each.name: each for each in self._bucket.objects() if _is_mirrored(each.name)}
        by_step = _by_step(found)
        self._steps = {step for step, names in by_step.items() if self._is_whole(step, names, found)}
        self._bucket.remove(
            name for step, names in by_step.items() if step not in self._steps for name in _marker_first(names)
        )
        kept = {name for step in self._steps for name in by_step[step] if not name.endswith(f"/{MARKER}")}
        wanted = [found[name] for name in sorted(found) if name in kept or _step_of(name) is None]
        if not wanted:
            return
        size = require_room(self.address, wanted, self.folder)
        print_stage(f"copying what {self.address} has to {self.folder}", size)
        self._bucket.download(wanted, self.folder, "copying")
        for each in wanted:
            self._sent[each.name] = _state(self.folder / each.name)
        print_on_main(f"{self.address}: checkpoints {', '.join(map(str, sorted(self._steps))) or 'none'}")

    def _is_whole(self, step: int, names: set[str], found: dict[str, Object]) -> bool:
        """Whether a checkpoint has its marker and all the files that it lists."""
        marker = f"{CHECKPOINTS}/{step}/{MARKER}"
        if marker not in names:
            return False
        return {name: found[name].size for name in names - {marker}} == self._listed(step)

    def _listed(self, step: int) -> dict[str, int]:
        """Files and sizes of a checkpoint, by its marker."""
        name = f"{CHECKPOINTS}/{step}/{MARKER}"
        try:
            return dict(json.loads(self._bucket.read(name))["files"])
        except (ValueError, TypeError, KeyError) as error:
            raise PSAError(
                f"{self.address}/{name}: lists no files, so that psa-jax train did not write this checkpoint; "
                "use another --workdir, or remove it from the bucket"
            ) from error

    def push(self) -> None:
        """Copies to the bucket what is new; every process may call it, process 0 does it.

        Metrics and logs come first, then checkpoints, then the removal of those that the run no longer keeps: a
        checkpoint in the bucket never is without its rows. The adapter comes last of all files.

        Raises:
          PSAError: the bucket cannot be written; what is whole there stays.
        """
        if not is_main_process():
            return
        files = self._files()
        new = {name: path for name, path in files.items() if self._sent.get(name) != _state(path)}
        states = {name: _state(path) for name, path in new.items()}
        adapter = new.pop(ADAPTER, None)
        # Content and not path: the run appends to its metrics, and what is put must be of one moment.
        for name, path in new.items():
            self._bucket.put(name, path.read_bytes() if path.suffix in (".jsonl", ".json") else path)
        steps = {int(path.name): path for path in self._checkpoints()}
        for step in sorted(set(steps) - self._steps):
            self._put_checkpoint(step, steps[step])
        for step in sorted(self._steps - set(steps)):
            self._remove_checkpoint(step)
        if adapter is not None:
            self._bucket.put(ADAPTER, adapter)
        self._sent |= states

    def _checkpoints(self) -> list[Path]:
        folder = self.folder / CHECKPOINTS
        return [path for path in folder.iterdir() if path.name.isdecimal()] if folder.is_dir() else []

    def _files(self) -> dict[str, Path]:
        """What the run has left so far, but for checkpoints and what is being written."""
        names = (path.relative_to(self.folder).as_posix() for path in sorted(self.folder.rglob("*")) if path.is_file())
        return {
            name: self.folder / name for name in names if _is_mirrored(name) and not name.startswith(f"{CHECKPOINTS}/")
        }

    def _put_checkpoint(self, step: int, folder: Path) -> None:
        files = {path.relative_to(self.folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        self._bucket.upload(files)
        sizes = {name: path.stat().st_size for name, path in files.items()}
        self._bucket.put(f"{CHECKPOINTS}/{step}/{MARKER}", json.dumps({"files": sizes}).encode())
        self._steps.add(step)

    def _remove_checkpoint(self, step: int) -> None:
        self._bucket.remove([f"{CHECKPOINTS}/{step}/{MARKER}", *self._listed(step)])
        self._steps.remove(step)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Copies what is left; of a run that failed its logs, too, if the bucket still takes them."""
        with self._held:
            if kind is None:
                self.push()
            elif isinstance(error, PSAError) and not isinstance(error, PeerLost):
                with contextlib.suppress(PSAError):  # the first error is the one to tell
                    self.push()


def _is_mirrored(name: str) -> bool:
    """Whether a file of a run belongs in the bucket: none of NOT_MIRRORED, none that is being written."""
    parts = name.split("/")
    return parts[0] not in NOT_MIRRORED and not any(part.startswith(".") for part in parts)


def _step_of(name: str) -> str | None:
    """The folder in checkpoints/ that a file is in: its step, or another name; None for other files."""
    folder, _, rest = name.partition("/")
    return rest.partition("/")[0] if folder == CHECKPOINTS else None


def _by_step(names: dict[str, Object]) -> dict[int, set[str]]:
    found: dict[int, set[str]] = {}
    for name in names:
        step = _step_of(name)
        if step is not None and step.isdecimal():
            found.setdefault(int(step), set()).add(name)
    return found


def _marker_first(names: set[str]) -> list[str]:
    return sorted(names, key=lambda name: (not name.endswith(f"/{MARKER}"), name))


def _state(path: Path) -> tuple[int, int]:
    about = path.stat()
    return about.st_size, about.st_mtime_ns
