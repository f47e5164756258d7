"""Facts of a Hugging Face model from its configuration and safetensors headers: nothing is loaded or allocated."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from memopt.errors import BadInput
from memopt.jobs.offload_facts import offload_job, with_adapters
from memopt.jobs.trace_memory import trace_step
from memopt.optim.routing import Routed, route
from memopt.patches.hf_checkpoint import build_skeleton, load_config
from memopt.patches.hf_files import TensorFiles, checkpoint_files, hub_trouble, local_directory
from memopt.patches.hf_model import HFLayeredModel, text_config
from memopt.planning.training_types import Engine, ModelFacts, ParameterFact, StepTrace, TrainingJob, Variant

_RUNTIME_CODE = {
    "memory": """
import torch
import transformers.trainer, transformers.models.auto.modeling_auto
from memopt.profiler.samplers import process_memory
x = torch.ones(64, 64, requires_grad=True)
(x @ x).sum().backward()
print(process_memory().charged_bytes)
""",
    # memopt's own loop measures itself when it has read the model: have it plan a small one
    "own": """
import tempfile
import torch
from transformers import LlamaConfig
import memopt
from memopt.jobs.preparation import RUNTIME_GROWTH_BYTES
sizes = dict(hidden_size=64, intermediate_size=64, num_attention_heads=4, num_hidden_layers=8, vocab_size=64)
tokens = torch.zeros(1, 16, dtype=torch.int64)
with tempfile.TemporaryDirectory() as model:
    LlamaConfig(**sizes, architectures=["LlamaForCausalLM"]).save_pretrained(model)
    config = memopt.FinetuneConfig(model=model, init="random", max_steps=1, device="cpu", dry_run=True, quiet=True)
    report = memopt.finetune(config, batches=[[{"input_ids": tokens, "labels": tokens}]])
print(report.results["plan"]["predicted"]["dram"]["runtime"] - RUNTIME_GROWTH_BYTES)
""",
}
_LONGEST_RUNTIME_S = 120
# configurations by the facts made of them, so that another variant can be traced
_CONFIGS: dict[str, Any] = {}


def read_model_facts(path_or_config: Any) -> ModelFacts:
    """Facts of a model directory, a hub id (its config.json and safetensors headers are fetched, no more) or a
    transformers configuration. Nothing is traced yet: `prepare` does that for a job.

    Raises BadInput for what cannot be found, read, or trained as a causal language model.
    """
    if isinstance(path_or_config, str | os.PathLike):
        source = os.fspath(path_or_config)
        config = load_config(source, weights=False)
        stored = _stored(source, config)
    else:
        config = path_or_config
        source = getattr(config, "name_or_path", "") or f"a {config.model_type} configuration"
        stored = _Stored({}, None, None, ())
    key = f"{source} {id(config)}"
    module = build_skeleton(config)
    text = text_config(config)
    layered = HFLayeredModel(module)
    heads = int(_first(text, "num_attention_heads", "n_head"))
    hidden = int(_first(text, "hidden_size", "n_embd", "d_model"))
    _CONFIGS[key] = config
    return ModelFacts(
        source=source,
        key=key,
        architecture=type(module).__name__,
        parameters=parameter_facts(module, stored.dtypes),
        layers=len(layered.blocks),
        hidden=hidden,
        vocab=int(layered.head.weight.shape[0]),
        heads=heads,
        kv_heads=int(_first(text, "num_key_value_heads", default=heads)),
        head_dim=int(_first(text, "head_dim", default=hidden // heads)),
        intermediate=int(_first(text, "intermediate_size", "ffn_dim", "n_inner", "d_ff", default=4 * hidden)),
        tied=layered.head.weight is layered.embedding.weight,
        max_positions=_first(text, "max_position_embeddings", "n_positions", default=None),
        sliding_window=_window(text),
        buffer_bytes=sum(b.untyped_storage().nbytes() for b in module.buffers()),
        checkpoint_bytes=stored.total_bytes,
        largest_shard_bytes=stored.largest_bytes,
        notes=stored.notes,
    )


def prepare(job: TrainingJob) -> TrainingJob:
    """The same job with all that `training_phases` reads: the trace of its variant, and memopt's own engine's job.

    Cheap when it is there already. Call it again after `replace` of any field. Raises BadInput.
    """
    facts = job.facts
    if all(trace.variant != job.variant for trace in facts.traces):
        facts = replace(facts, traces=(*facts.traces, _trace(facts, job.variant)))
    engine = job.engine in ("cpu-offload", "ssd")
    return replace(job, facts=facts, offload=offload_job(job, config_of(facts)) if engine else None)


def measure_runtime(engine: Engine = "memory") -> int:
    """Anonymous memory of a new process that has imported what a run of this engine imports (torch, transformers, its
    Trainer or memopt's own loop), in bytes; about ten seconds. Raises BadInput when they cannot be imported."""
    code = _RUNTIME_CODE["own" if engine in ("cpu-offload", "ssd") else "memory"]
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=_LONGEST_RUNTIME_S,
            check=True,
        )
        return int(done.stdout.split()[-1])
    except (subprocess.SubprocessError, ValueError, IndexError, OSError) as error:
        raise BadInput(f"the memory of an empty process could not be measured ({type(error).__name__})") from error


def parameter_facts(module: nn.Module, dtypes: Mapping[str, str] | None = None) -> tuple[ParameterFact, ...]:
    """All parameters of a skeleton, once each. `dtypes`: as stored, by name; others as they are in the skeleton."""
    layered = HFLayeredModel(module)
    of = {id(item.parameter): item for item in _routed(module)}
    layers = {id(p): index for index, block in enumerate(layered.blocks) for p in block.parameters()}
    facts = []
    for name, param in module.named_parameters():
        item = of[id(param)]
        facts.append(
            ParameterFact(
                name=name,
                shape=tuple(param.shape),
                dtype=(dtypes or {}).get(name, str(param.dtype).removeprefix("torch.")),
                role=item.role,
                parts=item.parts,
                trainable=param.requires_grad,
                layer=layers.get(id(param)),
                tied=item.tied,
            )
        )
    return tuple(facts)


def _routed(module: nn.Module) -> list[Routed]:
    """Routes of all parameters, frozen ones too."""
    frozen = [p for p in module.parameters() if not p.requires_grad]
    try:
        for p in frozen:
            p.requires_grad_(True)
        return route(module)
    finally:
        for p in frozen:
            p.requires_grad_(False)


def _trace(facts: ModelFacts, variant: Variant) -> StepTrace:
    module = variant_module(config_of(facts), variant)
    parameters = parameter_facts(module)
    traced = trace_step(module, variant, facts.sliding_window)
    return StepTrace(
        variant=variant,
        parameters=parameters,
        kinds=traced.kinds,
        first=traced.first,
        later=traced.later,
        notes=traced.notes,
    )


def variant_module(config: Any, variant: Variant) -> nn.Module:
    """A new skeleton in the variant's types, with its adapters. Raises BadInput."""
    dtype = getattr(torch, variant.weights_dtype)
    module = build_skeleton(config, attn_implementation=variant.attention, dtype=dtype)
    if variant.lora_rank is None:
        return module
    return with_adapters(module, variant.lora_rank, variant.lora_targets).module


def config_of(facts: ModelFacts) -> Any:
    """The transformers configuration that these are the facts of."""
    if facts.key not in _CONFIGS:
        _CONFIGS[facts.key] = load_config(facts.source, weights=False)
    return _CONFIGS[facts.key]


_MISSING = object()


def _first(config: Any, *names: str, default: Any = _MISSING) -> Any:
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return value
    if default is _MISSING:
        raise BadInput(f"{config.model_type}: its config has none of {', '.join(names)}; it cannot be planned")
    return default


def _window(text: Any) -> int | None:
    """Tokens of the sliding window, if any block uses one."""
    window = getattr(text, "sliding_window", None)
    if window is None or getattr(text, "use_sliding_window", True) is False:
        return None
    types = getattr(text, "layer_types", None)
    return None if types and not any("sliding" in t for t in types) else int(window)


class _Stored:
    """What the headers of a checkpoint say."""

    def __init__(
        self,
        dtypes: Mapping[str, str],
        total_bytes: int | None,
        largest_bytes: int | None,
        notes: tuple[str, ...],
    ):
        self.dtypes, self.total_bytes, self.largest_bytes, self.notes = dtypes, total_bytes, largest_bytes, notes


def _stored(source: str, config: Any) -> _Stored:
    directory = local_directory(source)
    if directory is None:
        return _stored_on_hub(source)
    try:
        files = checkpoint_files(directory, config)
    except BadInput:
        return _Stored({}, None, None, ("no safetensors files there: types and sizes are those of config.json",))
    specs = TensorFiles(files).specs
    sizes = [file.stat().st_size for file in files]
    dtypes = {name: str(spec.dtype).removeprefix("torch.") for name, spec in specs.items()}
    return _Stored(dtypes, sum(sizes), max(sizes), ())


_CODES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def _stored_on_hub(source: str) -> _Stored:
    from huggingface_hub import get_safetensors_metadata

    try:
        found = get_safetensors_metadata(source)
    except Exception as error:  # the hub client raises its HTTP library's errors, OSError and ValueError alike
        if os.environ.get("HF_HUB_OFFLINE"):
            return _Stored({}, None, None, ("offline: types and sizes are those of config.json",))
        raise hub_trouble(source, error) from error
    infos = [(info, sum(_nbytes(t) for t in info.tensors.values())) for info in found.files_metadata.values()]
    dtypes = {name: _CODES[t.dtype] for info, _ in infos for name, t in info.tensors.items() if t.dtype in _CODES}
    return _Stored(dtypes, sum(n for _, n in infos), max((n for _, n in infos), default=0), ())


def _nbytes(tensor: Any) -> int:
    first, last = tensor.data_offsets
    return int(last) - int(first)
