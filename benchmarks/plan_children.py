"""The measured side of plan_accuracy: `python -m benchmarks.plan_children JSON` trains one case and prints a result.

Anonymous and shared memory of the process is read every few milliseconds while it trains; then one more step is made
under torch's profiler, whose allocator events give the bytes of tensors.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULT_MARK as RESULT
from memopt.profiler.samplers import process_memory

_EVERY_S = 0.002


class Watch:
    """Peaks of this process's anonymous + shared memory by phase, sampled by a thread."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}
        self._phase = "start"
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Samples count for `name` meanwhile."""
        before, self._phase = self._phase, name
        self._sample()
        try:
            yield
        finally:
            self._sample()
            self._phase = before

    def close(self) -> None:
        """Stop sampling."""
        self._done.set()
        self._thread.join()

    def _loop(self) -> None:
        while not self._done.wait(_EVERY_S):
            self._sample()

    def _sample(self) -> None:
        memory = process_memory()
        assert memory is not None
        self.peaks[self._phase] = max(self.peaks.get(self._phase, 0), memory.charged_bytes)


def train(case: dict[str, Any], model: str, steps: int, save: bool) -> dict[str, Any]:
    """A plain loop over random tokens: loaded from safetensors, clipped, saved."""
    import torch
    import transformers.trainer  # noqa: F401 - as a job of the Trainer would
    from transformers import AutoModelForCausalLM

    memory = process_memory()
    assert memory is not None
    started = memory.charged_bytes
    watch = Watch()
    with watch.phase("load"):
        network: Any = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, case["weights_dtype"])).train()
        if case["method"] == "lora":
            from peft import LoraConfig, get_peft_model

            network = get_peft_model(network, LoraConfig(task_type="CAUSAL_LM", r=case["lora_rank"]))
        if case["gradient_checkpointing"]:
            network.gradient_checkpointing_enable()
            if case["method"] == "lora":
                network.enable_input_require_grads()
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = _optimizer(network, trained, case)
    rows = network.get_input_embeddings().weight.shape[0]
    draw = torch.Generator().manual_seed(0)

    def micro() -> Any:
        return torch.randint(0, rows, (case["batch_size"], case["seq_len"]), generator=draw)

    def forward(tokens: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=case["autocast"] is not None):
            return network(input_ids=tokens, labels=tokens, use_cache=False).loss / case["grad_accum"]

    for _ in range(steps):
        for _ in range(case["grad_accum"]):
            with watch.phase("forward"):
                loss = forward(micro())
            with watch.phase("backward"):
                loss.backward()
                del loss
        with watch.phase("optimizer"):
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
    if save:
        with watch.phase("save"), tempfile.TemporaryDirectory(dir=Path.cwd()) as directory:
            network.save_pretrained(directory)
    watch.close()
    return {
        "started_bytes": started,
        "phases": watch.peaks,
        "tensors": _tensors(network, optimizer, forward, micro, case),
    }


def _optimizer(network: Any, trained: Any, case: dict[str, Any]) -> Any:
    import torch

    kind = case["implementation"]
    if kind == "memopt":
        import memopt

        return memopt.build_optimizer(network, case["optimizer"], **case["optimizer_options"])
    return torch.optim.AdamW(trained, fused=kind == "fused", foreach=kind == "foreach")


def _tensors(network: Any, optimizer: Any, forward: Any, micro: Any, case: dict[str, Any]) -> dict[str, int]:
    """Tensor bytes at the peak of each phase of one step: what is held, and the allocator's events on top."""
    import torch

    held = _bytes([*network.parameters(), *network.buffers()])
    trained = [p for p in network.parameters() if p.requires_grad]
    states = _bytes([t for values in optimizer.state.values() for t in values.values() if isinstance(t, torch.Tensor)])
    found: dict[str, int] = {}
    for _ in range(case["grad_accum"]):
        there = held + states + _bytes([p.grad for p in trained if p.grad is not None])
        tokens = micro()
        with _events() as events:
            loss = forward(tokens)
        peak, kept = events()
        found["forward"] = max(found.get("forward", 0), there + peak)
        with _events() as events:
            loss.backward()
            del loss
        found["backward"] = max(found.get("backward", 0), there + kept + events()[0])
    there = held + states + _bytes([p.grad for p in trained if p.grad is not None])
    with _events() as events:
        optimizer.step()
    found["optimizer"] = there + events()[0]
    return found


def _bytes(tensors: Any) -> int:
    storages = [t.untyped_storage() for t in tensors]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


@contextmanager
def _events() -> Iterator[Any]:
    """The allocator's events; the function gives (peak, what is left) once the block is over."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        yield lambda: _sum(watched)


def _sum(watched: Any) -> tuple[int, int]:
    now = peak = 0
    for event in watched.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak, now


def main() -> None:
    """Run one case."""
    arguments = json.loads(sys.argv[1])
    print(RESULT + json.dumps(train(**arguments)), flush=True)


if __name__ == "__main__":
    main()
