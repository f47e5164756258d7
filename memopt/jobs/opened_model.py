"""A model as a job uses it: skeleton, blocks, where its first weights come from, how its result is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from memopt.errors import BadInput
from memopt.jobs.config import FinetuneConfig
from memopt.jobs.model_layout import model_layout
from memopt.jobs.progress import Progress
from memopt.jobs.rules import Rules, update_rules
from memopt.offload.layout import Layout
from memopt.offload.model import Binder
from memopt.patches.hf_checkpoint import (
    CheckpointReader,
    build_skeleton,
    decay_names,
    load_config,
    load_generation_config,
    random_init,
    write_checkpoint,
)
from memopt.patches.hf_model import HFLayeredModel


@dataclass(frozen=True, kw_only=True)
class OpenedModel:
    """`read(names)` gives initial values of parameters (named as in `layered.module`); `write` the result."""

    layered: HFLayeredModel
    hf_config: Any
    source: str
    decay: set[str]
    dtypes: Mapping[str, torch.dtype]
    """As stored in the checkpoint, by parameter name."""
    rules: Rules
    read: Callable[[list[str]], Mapping[str, torch.Tensor]]
    write: Callable[[Path, Callable[[str], torch.Tensor], Callable[[int, int], None]], None]
    notes: tuple[str, ...] = ()

    def layout(self, tile_rows: int) -> Layout:
        """Units with tables cut into tiles of at most this many rows."""
        return model_layout(
            self.layered, decay=self.decay, dtypes=self.dtypes, rules=self.rules.of, tile_rows=tile_rows
        )

    @property
    def output_bytes(self) -> int:
        """What the weights of the result take on disk."""
        adapters = any(not p.requires_grad for p in self.layered.module.parameters())
        return sum(
            p.numel() * (4 if adapters else self.dtypes.get(name, p.dtype).itemsize)
            for name, p in self.layered.module.named_parameters()
            if p.requires_grad
        )

    @property
    def table_shape(self) -> tuple[int, int]:
        """(rows, width) of the larger table."""
        embed, head = self.layered.embedding.weight, self.layered.head.weight
        rows = max(embed.shape[0], head.shape[0])
        return rows, max(embed.shape[1], head.shape[1])


def open_model(config: FinetuneConfig, source: str, compute_dtype: torch.dtype, *, tokenizer: Any) -> OpenedModel:
    """Everything about the model, no weights. Raises BadInput for what cannot be trained this way."""
    pretrained = config.init == "pretrained"
    hf_config = load_config(source, weights=pretrained)
    if getattr(hf_config, "output_router_logits", False):
        raise BadInput(
            f"{source}: its config asks for the router's auxiliary loss (output_router_logits), which "
            f"a streamed model cannot "
            "compute; set it to false"
        )
    module = build_skeleton(hf_config, dtype=compute_dtype)
    decay = decay_names(module)
    reader = CheckpointReader(source, module) if pretrained else None
    notes: list[str] = []
    dtypes: dict[str, torch.dtype] = {}
    if reader is not None:
        unexpected = reader.check()
        if unexpected:
            notes.append(
                f"{len(unexpected)} tensors of the checkpoint belong to no parameter and are ignored: "
                f"{unexpected[0]}..."
            )
        reader.load_buffers()
        dtypes = {name: reader.dtype(name) for name, _ in module.named_parameters()}
    generation = load_generation_config(source)

    def write_full(
        directory: Path, tensors: Callable[[str], torch.Tensor], progress: Callable[[int, int], None]
    ) -> None:
        write_checkpoint(
            directory,
            module,
            hf_config,
            tensors,
            dtypes=dtypes,
            tokenizer_from=tokenizer,
            generation_config=generation,
            progress=progress,
        )

    if config.method == "lora":
        assert reader is not None
        from memopt.patches.hf_lora import adapt

        adapted = adapt(
            module,
            rank=config.lora_rank,
            alpha=config.lora_alpha,
            dropout=config.lora_dropout,
            target_modules=config.lora_target_modules,
            base_name=source,
        )
        return OpenedModel(
            layered=HFLayeredModel(adapted.module),
            hf_config=hf_config,
            source=source,
            decay=decay_names(adapted.module),
            dtypes={n: dtypes[adapted.base(n)] for n, p in adapted.module.named_parameters() if not p.requires_grad},
            rules=update_rules(config, adapted.module),
            read=lambda names: adapted.read(names, reader.read, config.seed),
            write=lambda directory, tensors, progress: adapted.write(directory, tensors, tokenizer),
            notes=tuple(notes),
        )
    layered = HFLayeredModel(module)
    read = reader.read if reader is not None else _Drawn(layered, config.seed)
    return OpenedModel(
        layered=layered,
        hf_config=hf_config,
        source=source,
        decay=decay,
        dtypes=dtypes,
        rules=update_rules(config, module),
        read=read,
        write=write_full,
        notes=tuple(notes),
    )


def write_model(
    model: OpenedModel, layout: Layout, place: Path, tensors: Callable[[str], torch.Tensor], progress: Progress
) -> None:
    """Write the result to `place`, parameter by parameter, with a progress bar."""
    total = sum(u.master_bytes + u.frozen_bytes for u in layout.units)
    with progress.work("writing the model", total) as work:
        model.write(place, tensors, lambda done, _: work.advance(done - work.done_bytes))


class _Drawn:
    """Random initial values, a block at a time, the same however they are asked for."""

    def __init__(self, layered: HFLayeredModel, seed: int):
        self._layered, self._seed = layered, seed
        binder = Binder(layered.module)
        self._in_block = {
            name: layered.block_prefix(index).rstrip(".")
            for index, block in enumerate(layered.blocks)
            for name in binder.inside(block)
        }

    def __call__(self, names: list[str]) -> dict[str, torch.Tensor]:
        by_path: dict[str, list[str]] = {}
        for name in names:
            path = self._in_block.get(name, name.rpartition(".")[0])
            by_path.setdefault(path, []).append(name)
        out: dict[str, torch.Tensor] = {}
        for path, wanted in by_path.items():
            drawn = random_init(self._layered.module, path, self._seed)
            out.update({name: drawn[name] for name in wanted})
        return out
