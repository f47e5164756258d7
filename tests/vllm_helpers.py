"""A tiny Llama on disk, its key channels, engines in processes of their own, and the masked reference."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from memopt.kv.channel_file import ChannelSets, load_channels, save_channels
from memopt.kv.channels import choose
from memopt.patches.hf_identity import identity_of
from memopt.patches.vllm_config import VARIABLES, ThinKeys
from tests.data_helpers import tiny_tokenizer

ROOT = Path(__file__).resolve().parent.parent
HEAD_DIM = 64
LAYERS = 2
NEW_TOKENS = 24
PROMPT_LENGTHS = (4, 7, 67, 265, 433, 1, 130)
_CONFIG: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "eos_token_id": 0,
    "bos_token_id": None,
}


@dataclass
class Setup:
    """The model's directory; engines that ran are kept by what they were asked for. `program`: what runs one."""

    directory: Path
    lengths: tuple[int, ...] = PROMPT_LENGTHS
    new_tokens: int = NEW_TOKENS
    program: str = "tests.vllm_engine"
    done: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def model(self) -> Path:
        return self.directory / "model"

    def prompts(self) -> list[list[int]]:
        draw = torch.Generator().manual_seed(3)
        longest = torch.randint(3, 300, (max(self.lengths),), generator=draw).tolist()
        return [longest[-length:] if length % 2 else longest[:length] for length in self.lengths]

    def channels(self, keep: float) -> Path:
        """A file of random channels: what is kept does not matter, that both sides keep the same does."""
        return self.directory / f"keys-{keep}.safetensors"

    def run(self, keys: ThinKeys | None = None, *, passes: int = 1, **options: Any) -> dict[str, Any]:
        """Result of an engine with 64 MiB of KV cache; the same request is run once."""
        given: dict[str, Any] = {
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 1024,
            "max_num_seqs": 8,
            "enable_prefix_caching": False,
            "kv_cache_memory_bytes": 64 * 2**20,
            "disable_log_stats": True,
            **options,
        }
        request = {"model": str(self.model), "options": given, "prompts": self.prompts()}
        request |= {"new_tokens": self.new_tokens, "passes": passes}
        name = json.dumps([request, repr(keys)])
        if name not in self.done:
            self.done[name] = self._start(request, keys)
        return self.done[name]

    def reference(
        self, keys: ThinKeys, prompts: list[list[int]] | None = None, *, chunk: int = 10**6
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Tokens and log-probabilities of the masked reference; `prompts`: others than the setup's own."""
        from tests.reference.thin_server import greedy

        assert keys.channels is not None
        sets, given = load_channels(keys.channels), self.prompts() if prompts is None else prompts
        return greedy(self.model, given, self.new_tokens, sets, recent=keys.recent, chunk=chunk)

    def fail(self, keys: ThinKeys, model: Path | None = None, **options: Any) -> str:
        """Everything a failing engine wrote."""
        given = {"max_model_len": 256, "kv_cache_memory_bytes": 2**26, **options}
        request = {"model": str(model or self.model), "options": given, "prompts": [], "new_tokens": 1, "passes": 1}
        done, _ = self._process(request, keys)
        assert done.returncode != 0
        return done.stdout + done.stderr

    def _start(self, request: dict[str, Any], keys: ThinKeys | None) -> dict[str, Any]:
        done, result = self._process(request, keys)
        assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
        found: dict[str, Any] = json.loads(result.read_text())
        return found

    def _process(self, request: dict[str, Any], keys: ThinKeys | None) -> tuple[Any, Path]:
        asked, result = self.directory / "request.json", self.directory / "result.json"
        asked.write_text(json.dumps(request))
        result.unlink(missing_ok=True)
        command = [sys.executable, "-m", self.program, str(asked), str(result)]
        environment = clean_environment() | ({} if keys is None else keys.environment())
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, env=environment), result


def farthest(found: dict[str, Any], logprobs: list[list[float]]) -> float:
    """The largest difference of an engine's log-probabilities, in its first pass, to others."""
    pairs = zip(found["passes"][0]["logprobs"], logprobs, strict=True)
    return max(abs(a - b) for one, other in pairs for a, b in zip(one, other, strict=True))


def clean_environment() -> dict[str, str]:
    """This process's, without settings of the plugin; vLLM may neither phone home nor take both cores."""
    kept = {name: text for name, text in os.environ.items() if name not in VARIABLES}
    quiet = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return kept | quiet | {"OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "INFO", "PYTHONPATH": str(ROOT)}


def make_setup(directory: Path, keeps: tuple[float, ...] = (0.5, 0.625), **options: Any) -> Setup:
    """Save the model, its tokenizer and channel files; `options` of Setup."""
    from transformers import LlamaConfig, LlamaForCausalLM

    setup = Setup(directory, **options)
    torch.manual_seed(7)
    model = LlamaForCausalLM(LlamaConfig(**_CONFIG))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:  # attention that depends on its keys
                weight.mul_(4.0)
    model.save_pretrained(setup.model)
    tiny_tokenizer().save_pretrained(setup.model)
    for keep in keeps:
        write_channels(setup.channels(keep), keep, identity_of(model.config))
    return setup


def write_channels(path: Path, keep: float, model: Any, *, count: int | None = None) -> None:
    draw = torch.Generator().manual_seed(11)
    count = count or round(HEAD_DIM * keep)
    sets = {i: choose(torch.rand(model.kv_heads, model.head_dim, generator=draw), count) for i in range(model.layers)}
    save_channels(path, ChannelSets(model=model, keep=keep, keys=sets))
