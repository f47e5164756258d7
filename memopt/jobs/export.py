"""Write the model of a run out of its store, without training."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from memopt.errors import BadInput, StoreError
from memopt.jobs.config import FinetuneConfig
from memopt.jobs.model_layout import layout_digest
from memopt.jobs.opened_model import open_model, write_model
from memopt.jobs.output_dir import check_output, replace_output, require_space
from memopt.jobs.progress import Progress
from memopt.jobs.run_dir import RunDirectory
from memopt.offload.storage import stored_homes
from memopt.store.block_store import BlockStore
from memopt.store.transfer import IoPool


def export_run(offload_dir: Path, output: Path, *, overwrite: bool = False, quiet: bool = False) -> int:
    """Write the state of the last save in `offload_dir` to `output`; the step it is of.

    Raises StoreMissing, StoreFull, StoreLocked (a run is using it), BadInput when nothing was saved yet or the model
    that the run began with is not where it was.
    """
    from memopt.jobs.tokenizing import load_tokenizer

    check_output(output, overwrite=overwrite, keep={"--offload-dir": offload_dir})
    directory = RunDirectory(offload_dir)
    about = directory.about()
    saved = directory.saved()
    if saved is None:
        raise BadInput(f"{offload_dir}: nothing was saved yet; start it again with `memopt finetune ... --resume`")
    config = FinetuneConfig.of(**{k: v for k, v in about["config"].items() if v is not None})
    source = saved["fingerprint"]["model"]  # an absolute path, wherever the export is started from
    if config.model == "demo":
        source = os.fspath(offload_dir / "demo-model")
        config = config.with_changes(init="random")
    try:
        tokenizer = load_tokenizer(source)
    except BadInput:
        tokenizer = None
    dtype = getattr(torch, saved["compute"][1].removeprefix("torch."))
    model = open_model(config, source, dtype, tokenizer=tokenizer)
    layout = model.layout(int(saved["plan"]["tile_rows"]))
    if layout_digest(layout) != saved["layout"]:
        raise BadInput(f"{source} is not the model that this run began with (other parameters); put that one back")
    with IoPool() as pool, BlockStore.open(directory.state, pool, writable=False) as store:
        homes = stored_homes(store, layout)
        require_space(output, model.output_bytes)
        try:
            with Progress(quiet=quiet) as progress, replace_output(output, overwrite=overwrite) as place:
                write_model(model, layout, place, lambda name: homes.parameters([name])[name], progress)
        except OSError as error:
            raise StoreError(f"--output {output} could not be written ({error.strerror})") from error
        return int(store.meta["step"])
