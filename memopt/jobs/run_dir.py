"""The directory a run is offloaded to: what memopt put there, and nothing else.

memopt-run.json   what made it: the marker, and the effective configuration
state/            the block store: the checkpoint
scratch/          what one run spills
*.tokens          packed data
demo-model/, demo-corpus/   of `--model demo`
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memopt import __version__, atomic
from memopt.errors import BadInput
from memopt.store.block_store import BlockStore
from memopt.store.errors import StoreForeign, StoreIncomplete, StoreMissing
from memopt.store.files import is_tmpfs
from memopt.store.transfer import IoPool

MARKER = "memopt-run.json"
FORMAT = 1
_OWN_DIRECTORIES = ("demo-model", "demo-corpus")


@dataclass(frozen=True)
class RunDirectory:
    """One run's directory. `claim` it before writing into it."""

    path: Path

    @property
    def state(self) -> Path:
        return self.path / "state"

    @property
    def scratch(self) -> Path:
        return self.path / "scratch"

    def tokens(self, split: str) -> Path:
        return self.path / f"{split}.tokens"

    def claim(self, config: dict[str, Any]) -> list[str]:
        """Make the directory ours, or see that it is; returns what a person should know about it.

        Raises BadInput when it cannot be written, or StoreForeign when it holds somebody else's files.
        """
        notes = []
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            entries = [e.name for e in self.path.iterdir()]
            if entries and MARKER not in entries:
                raise StoreForeign(
                    f"--offload-dir {self.path} holds files that are not memopt's ({', '.join(sorted(entries)[:3])}"
                    f"{', ...' if len(entries) > 3 else ''}); name an empty or new directory"
                )
            if MARKER in entries:
                self.about()
            if not self.state.exists() or MARKER not in entries:
                self._write(config)
        except NotADirectoryError:
            raise BadInput(f"--offload-dir {self.path} is not a directory; name a directory on the SSD") from None
        except FileExistsError:
            raise BadInput(f"--offload-dir {self.path} is a file; name a directory on the SSD") from None
        except OSError as error:
            raise BadInput(
                f"--offload-dir {self.path} cannot be used ({error.strerror}); name a directory you can write to"
            ) from error
        if is_tmpfs(self.path):
            notes.append(f"--offload-dir {self.path} is on tmpfs, which is DRAM: what is offloaded there saves nothing")
        return notes

    def about(self) -> dict[str, Any]:
        """What the marker says. Raises StoreMissing or BadInput."""
        try:
            about = json.loads((self.path / MARKER).read_text())
        except FileNotFoundError:
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
        return dict(about)

    def saved(self) -> dict[str, Any] | None:
        """Meta of the last save, or None when nothing was saved yet. Raises StoreLocked while another process writes."""
        if not self.state.exists():
            return None
        with IoPool(1) as pool:
            try:
                with BlockStore.open(self.state, pool, writable=False) as store:
                    return store.meta if "step" in store.meta else None
            except (StoreIncomplete, StoreMissing):
                return None

    def forget_state(self) -> None:
        """Remove a state in which nothing was saved."""
        if self.state.exists():
            BlockStore.destroy(self.state)

    def remember(self, config: dict[str, Any]) -> None:
        """Keep the configuration of the run that starts now."""
        self._write(config)

    def clean(self) -> list[str]:
        """Remove what memopt made and, if then empty, the directory. Returns what was left because it is not ours.

        Raises StoreMissing without a marker, StoreLocked while a run is using it.
        """
        self.about()
        for part in (self.state, self.scratch):
            if part.exists():
                BlockStore.destroy(part)
        for name in _OWN_DIRECTORIES:
            if (self.path / name).is_dir():
                shutil.rmtree(self.path / name)
        for file in self.path.glob("*.tokens"):
            file.unlink()
        (self.path / MARKER).unlink()
        left = sorted(e.name for e in self.path.iterdir())
        if not left:
            os.rmdir(self.path)
        return left

    def _write(self, config: dict[str, Any]) -> None:
        about = {"memopt": __version__, "format": FORMAT, "config": config}
        atomic.write_text(self.path / MARKER, json.dumps(about, indent=1))
