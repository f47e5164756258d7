"""The demo's model, tokenizer and text are made on the spot, deterministically, in little memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from memopt.errors import BadInput
from memopt.jobs import demo_model
from memopt.jobs.data import prepare
from memopt.jobs.demo_model import MARKER, MODEL_CONFIG, parameter_count, prepare_demo
from memopt.jobs.tokenizing import load_tokenizer
from memopt.units import GiB, MiB

CORPUS_BYTES = 300_000


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> demo_model.Demo:
    return prepare_demo(tmp_path_factory.mktemp("demo"), CORPUS_BYTES)


def test_the_training_state_is_three_budgets() -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**MODEL_CONFIG))
    assert sum(each.numel() for each in model.parameters()) == parameter_count()
    assert 16 * parameter_count() > max(3 * 512 * MiB, 1.6 * GiB)


def test_it_trains_from_real_text(demo: demo_model.Demo, tmp_path: Path) -> None:
    texts = sorted(demo.corpus_dir.glob("*.txt"))
    total = sum(path.stat().st_size for path in texts)
    assert len(texts) > 3 and CORPUS_BYTES <= total < CORPUS_BYTES + 128 * 1024
    assert any('"""' in path.read_text() for path in texts)
    tokenizer = load_tokenizer(str(demo.model_dir))
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    sample = texts[0].read_text()
    assert tokenizer.decode(tokenizer(sample, verbose=False)["input_ids"]) == sample
    data = prepare(
        str(demo.corpus_dir), tokenizer, seq_len=256, vocab_size=MODEL_CONFIG["vocab_size"], path=tmp_path / "tokens"
    )
    assert data.counts["documents"] == len(texts)
    assert 2.0 < total / data.counts["tokens"] < 6.0


def test_the_config_loads(demo: demo_model.Demo) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(demo.model_dir)
    assert (config.model_type, config.num_hidden_layers, config.tie_word_embeddings) == ("llama", 21, False)


def test_it_is_reused_and_the_same_every_time(demo: demo_model.Demo, tmp_path: Path) -> None:
    made = (demo.model_dir / "tokenizer.json").stat()
    assert prepare_demo(demo.model_dir.parent, CORPUS_BYTES) == demo
    assert (demo.model_dir / "tokenizer.json").stat().st_mtime_ns == made.st_mtime_ns
    again = prepare_demo(tmp_path, CORPUS_BYTES)
    for part in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (again.model_dir / part).read_bytes() == (demo.model_dir / part).read_bytes()
    assert [each.name for each in sorted(again.corpus_dir.iterdir())] == [
        each.name for each in sorted(demo.corpus_dir.iterdir())
    ]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["demo-corpus", "demo-model"]


def test_what_memopt_did_not_make_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "demo-corpus").mkdir()
    (tmp_path / "demo-corpus" / "mine.txt").write_text("mine")
    with pytest.raises(BadInput, match="not made by memopt"):
        demo_model.demo_corpus(tmp_path / "demo-corpus", 1000)
    assert [each.name for each in (tmp_path / "demo-corpus").iterdir()] == ["mine.txt"]


def test_a_stale_one_is_made_anew(tmp_path: Path) -> None:
    demo_model.demo_corpus(tmp_path / "c", 1000)
    marker = tmp_path / "c" / MARKER
    assert json.loads(marker.read_text())["corpus_bytes"] == 1000
    (tmp_path / "c" / "old.txt").write_text("old")
    demo_model.demo_corpus(tmp_path / "c", 2000)
    assert not (tmp_path / "c" / "old.txt").exists()
    assert json.loads(marker.read_text())["corpus_bytes"] == 2000
