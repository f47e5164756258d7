"""The directory a run is offloaded to: what memopt put there, and nothing else.

memopt-run.json   what made it: the marker, and the effective configuration
state/            the block store: the checkpoint
scratch/          what one run spills
*.tokens          packed data
demo-model/, demo-corpus/   of `--model demo`
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memopt import __version__, atomic
from memopt.errors import BadInput
from memopt.jobs import demo_model
from memopt.store import manifest
from memopt.store.block_store import BlockStore
from memopt.store.errors import StoreForeign, StoreLocked, StoreMissing
from memopt.store.files import is_tmpfs
from memopt.store.locks import holder_of
from memopt.store.transfer import IoPool

MARKER = "memopt-run.json"
FORMAT = 1
_TOKENS = ("train.tokens", "eval.tokens")
_DEMO = ("demo-model", "demo-corpus")
_HARMLESS = ("lost+found",)  # what a fresh file system has


@dataclass(frozen=True)
class RunDirectory:
    """One run's directory. `claim` it before writing into it, and `hold` it while doing so."""

    path: Path

    @property
    def state(self) -> Path:
        return self.path / "state"

    @property
    def scratch(self) -> Path:
        return self.path / "scratch"

    def refuse_own(self, path: Path, flag: str) -> None:
        """Raises BadInput when `path` is a place that a run keeps its own files in."""
        root, there = self.path.absolute().resolve(), path.absolute().resolve()
        inside = there.relative_to(root).parts[:1] if there.is_relative_to(root) else ()
        if inside and inside[0] in (MARKER, self.state.name, self.scratch.name, *_TOKENS, *_DEMO):
            raise BadInput(f"{flag} {path} is where the run keeps its {inside[0]}; name another place")

    def look(self) -> list[str]:
        """What a person should know before this directory is used; nothing is written.

        Raises BadInput when it is no directory or of another format, StoreForeign when it holds somebody else's files.
        """
        notes = []
        try:
            entries = {e.name for e in self.path.iterdir()} if self.path.exists() else set()
            if MARKER in entries:
                self.about()
            elif foreign := sorted(e for e in entries if e not in _HARMLESS and not _is_unfinished_marker(e)):
                raise StoreForeign(
                    f"--offload-dir {self.path} holds files that are not memopt's ({', '.join(foreign[:3])}"
                    f"{', ...' if len(foreign) > 3 else ''}); name an empty or new directory"
                )
        except OSError as error:
            raise self._unusable(error) from error
        if is_tmpfs(self.path):
            notes.append(f"--offload-dir {self.path} is on tmpfs, which is DRAM: what is offloaded there saves nothing")
        return notes

    def claim(self, config: dict[str, Any]) -> bool:
        """Make the directory ours; whether it was not before. Raises BadInput when it cannot be written."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            new = not (self.path / MARKER).exists()
            if new:
                self._write(config)
            return new
        except OSError as error:
            raise self._unusable(error) from error

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Keep other processes from training into, or cleaning, this directory. Raises StoreLocked when one is."""
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                # some network file systems lock no directories; the lock of the store inside holds there
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    raise StoreLocked(
                        f"{self.path} is in use by {holder_of(self.path)}; wait for it, stop it, or "
                        f"use another directory"
                    ) from None
            yield
        finally:
            os.close(fd)

    def about(self) -> dict[str, Any]:
        """What the marker says. Raises StoreMissing or BadInput."""
        try:
            about = json.loads((self.path / MARKER).read_text())
            if not isinstance(about, dict):
                raise ValueError("it holds no object")
        except (FileNotFoundError, NotADirectoryError):
            raise StoreMissing(
                f"{self.path} holds no memopt run (no {MARKER}); name the --offload-dir of one"
            ) from None
        except (OSError, ValueError) as error:
            raise BadInput(f"{self.path / MARKER} cannot be read ({error}); name another --offload-dir") from None
        if about.get("format") != FORMAT:
            raise BadInput(
                f"{self.path} was made by memopt {about.get('memopt', '?')} in format {about.get('format')!r}, this is "
                f"{__version__} with format {FORMAT}; finish or export it with that version, or name another directory"
            )
        return about

    def saved(self) -> dict[str, Any] | None:
        """Meta of the last save, or None when nothing was saved yet. Raises StoreLocked while another process
        writes."""
        if not (self.state / manifest.MANIFEST).exists():
            return None
        manifest.read_marker(self.state)
        if "step" not in manifest.read_manifest(self.state).meta:
            return None  # its creation or its removal was cut short: do not ask for its data files
        with IoPool(1) as pool, BlockStore.open(self.state, pool, writable=False) as store:
            return store.meta

    def forget(self, store: Path) -> None:
        """Remove `state` in which nothing was saved, or an old `scratch`; also what a killed creation left of one."""
        if not store.exists():
            return
        if _is_unborn(store):
            for name in (manifest.LOCK, manifest.MARKER):
                (store / name).unlink(missing_ok=True)
            store.rmdir()
        else:
            BlockStore.destroy(store)

    def remember(self, config: dict[str, Any]) -> None:
        """Keep the configuration of the run that starts now."""
        self._write(config)

    def clean(self) -> list[str]:
        """Remove what memopt made and, if then empty, the directory. Returns what was left because it is not ours.

        Raises StoreMissing without a marker, StoreLocked while a run is using it.
        """
        self.about()
        with self.hold():
            return self.discard()

    def discard(self) -> list[str]:
        """`clean` for the process that holds the directory."""
        for part in (self.state, self.scratch):
            self.forget(part)
        for name in _DEMO:
            if (self.path / name / demo_model.MARKER).exists():
                shutil.rmtree(self.path / name)
            for unfinished in self.path.glob(f".{name}.*"):
                shutil.rmtree(unfinished)
        for name in _TOKENS:
            (self.path / name).unlink(missing_ok=True)
            (self.path / f"{name}.part").unlink(missing_ok=True)
        for entry in list(self.path.iterdir()):
            if _is_unfinished_marker(entry.name):
                entry.unlink()
        (self.path / MARKER).unlink()
        left = sorted(e.name for e in self.path.iterdir())
        if not left:
            with contextlib.suppress(OSError):  # a mount point stays
                os.rmdir(self.path)
        return left

    def _write(self, config: dict[str, Any]) -> None:
        about = {"memopt": __version__, "format": FORMAT, "config": config}
        atomic.write_text(self.path / MARKER, json.dumps(about, indent=1))

    def _unusable(self, error: OSError) -> BadInput:
        if isinstance(error, (NotADirectoryError, FileExistsError)):
            return BadInput(f"--offload-dir {self.path} is or lies below a file; name a directory on the SSD")
        return BadInput(
            f"--offload-dir {self.path} cannot be used ({error.strerror}); name a directory you can write to"
        )


def _is_unborn(store: Path) -> bool:
    """Whether this is all that a store's creation left which was killed before its marker was written."""
    own = (manifest.LOCK, manifest.MARKER)
    return store.is_dir() and all(e.name in own and e.stat().st_size == 0 for e in store.iterdir())


def _is_unfinished_marker(name: str) -> bool:
    return name.startswith(f".{MARKER}.") and name.endswith(".tmp")
