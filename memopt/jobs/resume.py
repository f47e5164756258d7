"""Whether a run may use an offload directory: begin in it, go on with what it holds, or neither."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from memopt.errors import BadInput, MemoptError
from memopt.jobs.config import FinetuneConfig, differences
from memopt.jobs.run_dir import RunDirectory

_MEANING = {
    "data": "the content of the data",
    "steps": "the number of steps",
    "layout": "the names, shapes or types of the model's parameters",
    "compute": "device and dtype of the computation",
}


@contextmanager
def claimed(directory: RunDirectory, config: FinetuneConfig) -> Iterator[None]:
    """Make the directory ours and hold it; one that was new is removed again when the run cannot even begin.

    Raises BadInput when it cannot be written, StoreLocked while another process works in it.
    """
    new = directory.claim(config.to_dict())
    with directory.hold():
        try:
            yield
        except (MemoptError, KeyboardInterrupt):
            if new and directory.saved() is None:
                directory.discard()
            raise


def refuse_or_resume(config: FinetuneConfig, directory: RunDirectory | None, notes: list[str]) -> dict[str, Any] | None:
    """Meta of the save to go on from; None to start from the beginning, with what to say about it added to `notes`.

    Raises BadInput when there is a save and nobody said what to do with it.
    """
    if directory is None:
        return None
    saved = directory.saved()
    if saved is not None:
        if config.resume or config.dry_run:
            return saved if config.resume else None
        raise BadInput(
            f"--offload-dir {directory.path} holds a run saved at step {saved['step']} of {saved['steps']}: "
            f"go on with --resume, keep its model with `memopt export {directory.path} --output DIR`, or remove it "
            f"with `memopt clean {directory.path}`"
        )
    if config.resume:
        notes.append("nothing was saved yet: starting over")
    if not config.dry_run:
        directory.forget(directory.state)
    return None


def require_same_run(directory: RunDirectory, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises BadInput that names what differs between the run that was saved and the one that would go on with it."""
    changed = differences(saved["fingerprint"], now["fingerprint"])
    for key, meaning in _MEANING.items():
        if saved[key] != now[key]:
            told = f" ({saved[key]} then, {now[key]} now)" if key in ("steps", "compute") else ""
            changed.append(f"{meaning} changed{told}")
    if changed:
        raise BadInput(
            f"--resume: this is not the run that {directory.path} holds: {'; '.join(changed)}. Resume with the old "
            "settings, or start a new run in another --offload-dir"
        )
