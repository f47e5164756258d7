"""`--model demo`: a small Llama, a tokenizer and real text, made on the spot from what every Python installation has.

The text is the standard library's own sources and docstrings; the tokenizer is trained from it, in a child process so
that the memory of doing so is gone before the training begins. No weights are written: the demo starts from random
ones.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import memopt
from memopt.errors import BadInput, MemoptError
from memopt.units import MiB

VOCAB_SIZE = 4096
CORPUS_BYTES = 4 * MiB
END_OF_TEXT = "<|endoftext|>"
MARKER = "memopt-demo.json"
_SKIPPED = ("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "lib-dynload")
_FILE_BYTES = 128 * 1024

# 111.9M parameters: with gradients and AdamW's two moments in float32 (16 bytes each) 1.67 GiB, 3.3 times a budget of
# 512 MiB. Deep and narrow, because a few blocks are what must be in memory at once.
MODEL_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 640,
    "intermediate_size": 1792,
    "num_hidden_layers": 21,
    "num_attention_heads": 10,
    "num_key_value_heads": 10,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 1024,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "dtype": "float32",
}


@dataclass(frozen=True)
class Demo:
    """Where the demo's parts are: a model directory without weights (use `init="random"`), and a directory of text."""

    model_dir: Path
    corpus_dir: Path


def prepare_demo(work_dir: str | os.PathLike[str], corpus_bytes: int = CORPUS_BYTES) -> Demo:
    """Make (or reuse) the demo under `work_dir`, in a child process. Takes a few seconds; deterministic.

    Raises BadInput when `work_dir` cannot hold it, MemoptError when the child fails.
    """
    work_dir = Path(work_dir)
    demo = Demo(work_dir / "demo-model", work_dir / "demo-corpus")
    if all(_is_made(part, corpus_bytes) for part in (demo.model_dir, demo.corpus_dir)):
        return demo
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{work_dir}: cannot be made ({error.strerror}); name a directory you may write to") from None
    root = str(Path(memopt.__file__).resolve().parent.parent)
    search = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    # one thread: each of the tokenizer's threads would keep its own word counts
    limits = {"PYTHONPATH": search, "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "memopt.jobs.demo_model", str(work_dir), str(corpus_bytes)]
    child = subprocess.run(command, env={**os.environ, **limits}, capture_output=True, text=True, check=False)
    if child.returncode != 0:
        last_line = (child.stderr.strip().splitlines() or ["no message"])[-1]
        raise MemoptError(f"{work_dir}: the demo could not be made ({last_line}); check its space and permissions")
    return demo


def demo_corpus(directory: Path, max_bytes: int = CORPUS_BYTES) -> None:
    """Write at least `max_bytes` (less than one file more) of the standard library's sources to `directory`, as text.

    One .txt file per module, so that one document is one module; the choice is spread over the library.
    """
    with _replacing(directory, max_bytes) as making:
        written = 0
        for name, text in _sources():
            (making / f"{name}.txt").write_text(text, encoding="utf-8")
            written += len(text.encode())
            if written >= max_bytes:
                return
        if not written:
            raise BadInput(f"no Python sources under {sysconfig.get_path('stdlib')}: give --data and another --model")


def demo_model(directory: Path, corpus_dir: Path, max_bytes: int = CORPUS_BYTES) -> None:
    """Write the model's configuration and a byte-level BPE tokenizer trained on `corpus_dir` to `directory`."""
    with _replacing(directory, max_bytes) as making:
        (making / "config.json").write_text(json.dumps(MODEL_CONFIG, indent=2))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END_OF_TEXT,
            "pad_token": END_OF_TEXT,
            "model_max_length": MODEL_CONFIG["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
        }
        (making / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
        _train_tokenizer(sorted(corpus_dir.glob("*.txt")), making / "tokenizer.json")


def parameter_count(config: dict[str, Any] = MODEL_CONFIG) -> int:
    """Parameters of a Llama without biases."""
    width, heads, kv_heads = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    attention = 2 * width * config["head_dim"] * (heads + kv_heads)
    block = attention + 3 * width * config["intermediate_size"] + 2 * width
    ends = config["vocab_size"] * width * (1 if config["tie_word_embeddings"] else 2) + width
    return int(config["num_hidden_layers"] * block + ends)


def _sources() -> Iterator[tuple[str, str]]:
    """(dotted name, text) of the standard library's modules, in an order that mixes its packages."""
    root = Path(sysconfig.get_path("stdlib"))
    found = [
        path.relative_to(root)
        for path in root.rglob("*.py")
        if not any(part in _SKIPPED or part.startswith(("test_", "config-")) for part in path.relative_to(root).parts)
    ]
    for path in sorted(found, key=lambda each: (hashlib.blake2b(str(each).encode()).digest(), str(each))):
        try:
            text = (root / path).read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        # one giant table of constants would be most of a small corpus
        if text.strip() and len(text) <= _FILE_BYTES:
            yield ".".join(path.with_suffix("").parts), text


def _train_tokenizer(files: list[Path], path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train([str(file) for file in files], trainer)
    tokenizer.save(str(path))


def _recipe(corpus_bytes: int) -> dict[str, Any]:
    return {"memopt": "demo/1", "python": sys.version, "corpus_bytes": corpus_bytes, "config": MODEL_CONFIG}


def _is_made(directory: Path, corpus_bytes: int) -> bool:
    try:
        return bool(json.loads((directory / MARKER).read_text()) == _recipe(corpus_bytes))
    except (OSError, ValueError):
        return False


@contextmanager
def _replacing(directory: Path, corpus_bytes: int) -> Iterator[Path]:
    """A directory made aside and put in place when complete; what stood there is removed only if it has our marker."""
    if directory.exists() and not (directory / MARKER).exists():
        raise BadInput(f"{directory}: exists and was not made by memopt; name another directory")
    directory.parent.mkdir(parents=True, exist_ok=True)
    making = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))
    try:
        making.chmod(0o755)
        yield making
        (making / MARKER).write_text(json.dumps(_recipe(corpus_bytes)))
        if directory.exists():
            shutil.rmtree(directory)
        os.replace(making, directory)
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        raise


def main() -> None:
    """`python -m memopt.jobs.demo_model DIRECTORY [CORPUS_BYTES]`: make the demo there."""
    work_dir = Path(sys.argv[1])
    corpus_bytes = int(sys.argv[2]) if len(sys.argv) > 2 else CORPUS_BYTES
    demo_corpus(work_dir / "demo-corpus", corpus_bytes)
    demo_model(work_dir / "demo-model", work_dir / "demo-corpus", corpus_bytes)


if __name__ == "__main__":
    main()
