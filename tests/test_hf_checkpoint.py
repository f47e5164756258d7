"""Streaming Hugging Face checkpoints, against from_pretrained, save_pretrained and the Trainer themselves."""

from __future__ import annotations

import errno
import json
import os
import re
import weakref
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from memopt.errors import BadInput, StoreError  # noqa: E402
from memopt.patches import hf_files, hf_init  # noqa: E402
from memopt.patches.hf_checkpoint import (  # noqa: E402
    CheckpointReader,
    build_skeleton,
    decay_names,
    load_config,
    load_generation_config,
    random_init,
    write_checkpoint,
)

COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**COMMON, "tie_word_embeddings": False}),
    "llama-tied": ("llama", {**COMMON, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**COMMON, "head_dim": 8, "tie_word_embeddings": True}),
    "gemma3": ("gemma3_text", {**COMMON, "head_dim": 8}),
    "gpt2": ("gpt2", {"vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, **IDS}),
    "opt": (
        "opt",
        {
            "vocab_size": 97,
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 32,
            **IDS,
        },
    ),
    "mixtral": ("mixtral", {**COMMON, "num_local_experts": 4}),
    "qwen3-moe": (
        "qwen3_moe",
        {**COMMON, "head_dim": 8, "num_experts": 4, "moe_intermediate_size": 24, "mlp_only_layers": [1]},
    ),
    "deepseek-v3": (
        "deepseek_v3",
        {
            **COMMON,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "moe_intermediate_size": 16,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
    "phimoe": ("phimoe", {**COMMON, "num_local_experts": 4}),
    "minimax-m2": ("minimax_m2", {**COMMON, "head_dim": 8, "num_local_experts": 4}),
}
MOE = ("mixtral", "qwen3-moe", "deepseek-v3")


def config_of(name: str, **changes: Any) -> Any:
    kind, options = MODELS[name]
    return AutoConfig.for_model(kind, **{**options, **changes})


def random_model(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    model = AutoModelForCausalLM.from_config(config_of(name, **changes), dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.rand(tensor.shape, generator=generator))
    return model


def part_of(name: str) -> str:
    """The decoder block that a parameter belongs to, else its own module."""
    block = re.match(r".*?\.\d+(?=\.)", name)
    return block[0] if block else name.rpartition(".")[0]


def parts(model: Any) -> dict[str, list[str]]:
    found = defaultdict(list)
    for name, _ in model.named_parameters():
        found[part_of(name)].append(name)
    return found


def stored(directory: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in directory.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return set(one) == set(other) and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


class LiveBytes(TorchDispatchMode):
    """Peak bytes of the distinct CPU storages made under it and alive at once, views of files included."""

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = self._bytes = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs or {}, out)):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                self.note(tensor)
        return out

    def note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._seen:
            self._seen.add(key)
            self._bytes += storage.nbytes()
            self.peak_bytes = max(self.peak_bytes, self._bytes)
            weakref.finalize(storage, self._drop, key, storage.nbytes())

    def _drop(self, key: int, nbytes: int) -> None:
        self._seen.discard(key)
        self._bytes -= nbytes


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shard", ["50GB", "20KB"])
def test_round_trip(name: str, shard: str, tmp_path: Path) -> None:
    model = random_model(name)
    state = model.state_dict()
    model.save_pretrained(tmp_path / "in", max_shard_size=shard)
    config = load_config(tmp_path / "in")
    skeleton = build_skeleton(config)
    with CheckpointReader(tmp_path / "in", skeleton) as reader:
        assert reader.check() == []
        reader.load_buffers()
        for names in parts(skeleton).values():
            read = reader.read(names)
            assert equal(read, {n: state[n] for n in names})
            for n in names:
                assert read[n].untyped_storage().nbytes() == read[n].nbytes == reader.nbytes(n)
                assert reader.dtype(n) == state[n].dtype
    assert all(p.is_meta for p in skeleton.parameters())

    asked: list[str] = []

    def fetch(n: str) -> torch.Tensor:
        asked.append(n)
        return state[n]

    seen: list[tuple[int, int]] = []
    write_checkpoint(
        tmp_path / "out",
        skeleton,
        config,
        fetch,
        dtypes={},
        max_shard_bytes=10**9 if shard == "50GB" else 20_000,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert sorted(asked) == sorted(n for n, _ in model.named_parameters())  # each once, tied ones too
    before, after = stored(tmp_path / "in"), stored(tmp_path / "out")
    assert equal(before, after)
    assert seen[-1] == (seen[-1][1],) * 2 == (sum(t.nbytes for t in after.values()),) * 2
    for file in ("config.json", "generation_config.json"):
        assert (tmp_path / "in" / file).read_text() == (tmp_path / "out" / file).read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert equal(again.state_dict(), state)
    if shard == "50GB":
        one, two = (tmp_path / place / "model.safetensors" for place in ("in", "out"))
        assert one.read_bytes() == two.read_bytes()
    else:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(after)
        assert index["metadata"]["total_parameters"] == model.num_parameters()


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "mixtral"])
def test_bfloat16(name: str, tmp_path: Path) -> None:
    model = random_model(name, torch.bfloat16)
    model.save_pretrained(tmp_path / "in")
    config = load_config(tmp_path / "in")
    skeleton = build_skeleton(config, dtype=torch.float32)
    assert {p.dtype for p in skeleton.parameters()} == {torch.float32}
    assert config.dtype == torch.bfloat16  # not changed by building in another type
    with CheckpointReader(tmp_path / "in", skeleton) as reader:
        reader.check()
        names = [n for n, _ in skeleton.named_parameters()]
        read = reader.read(names)
        assert {reader.dtype(n) for n in names} == {torch.bfloat16}
    assert equal(read, {n: model.state_dict()[n] for n in names})
    wide = {n: t.float() for n, t in read.items()}
    write_checkpoint(tmp_path / "out", skeleton, config, wide.__getitem__, dtypes=dict.fromkeys(names, torch.bfloat16))
    assert equal(stored(tmp_path / "in"), stored(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "gemma3", "opt", "mixtral"])
def test_skeleton_is_the_model_without_weights(name: str) -> None:
    config = config_of(name)
    before = torch.random.get_rng_state()
    skeleton = build_skeleton(config, attn_implementation="eager")
    assert torch.equal(before, torch.random.get_rng_state())
    model = AutoModelForCausalLM.from_config(config)
    assert skeleton.training
    assert skeleton.config._attn_implementation == "eager"
    assert all(p.is_meta and p.requires_grad for p in skeleton.parameters())
    same = [(n, tuple(p.shape), p.dtype) for n, p in model.named_parameters()]
    assert [(n, tuple(p.shape), p.dtype) for n, p in skeleton.named_parameters()] == same
    assert equal(dict(skeleton.named_buffers()), dict(model.named_buffers()))
    assert torch.nn.Linear(2, 2).weight.device.type == "cpu"  # construction is as it was


def test_skeleton_larger_than_any_memory() -> None:
    skeleton = build_skeleton(config_of("llama", vocab_size=10**7, hidden_size=2**17, num_hidden_layers=1))
    assert skeleton.num_parameters() > 10**12


def test_base_model_names(tmp_path: Path) -> None:
    model = random_model("gpt2")
    model.transformer.save_pretrained(tmp_path)  # names without the prefix "transformer."
    skeleton = build_skeleton(config_of("gpt2"))
    with CheckpointReader(tmp_path, skeleton) as reader:
        assert reader.check() == []
        names = [n for n, _ in skeleton.named_parameters()]
        assert equal(reader.read(names), {n: model.state_dict()[n] for n in names})
        # the second name of a tied weight, and a name that is nowhere
        assert torch.equal(reader.read(["lm_head.weight"])["lm_head.weight"], model.lm_head.weight)
        with pytest.raises(BadInput, match="holds no tensor for nothing.weight"):
            reader.read(["nothing.weight"])


@pytest.mark.parametrize("name", MOE)
def test_memory_of_reading_and_writing_is_that_of_a_block(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model(name, num_hidden_layers=12, vocab_size=16, intermediate_size=64)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    model.save_pretrained(tmp_path / "in", max_shard_size="100KB")
    skeleton = build_skeleton(load_config(tmp_path / "in"))
    blocks = parts(skeleton)
    largest = max(sum(state[n].nbytes for n in names) for names in blocks.values())
    assert sum(t.nbytes for t in state.values()) > 9 * largest
    with CheckpointReader(tmp_path / "in", skeleton) as reader:
        with LiveBytes() as live:
            for names in blocks.values():
                reader.read(names)
        # the result, and for one fused tensor its sources and the intermediate stack
        assert largest <= live.peak_bytes <= 3 * largest
    with LiveBytes() as live:
        for tensor in state.values():
            live.note(tensor)
        before = live.peak_bytes
        write_checkpoint(
            tmp_path / "out", skeleton, skeleton.config, lambda n: state[n].clone(), dtypes={}, max_shard_bytes=10**5
        )
    one = max(state[n].nbytes for n, _ in model.named_parameters())
    # the fused tensor, the views split off it and their contiguous copies
    assert one <= live.peak_bytes - before <= 3 * one


@pytest.mark.parametrize("name", MOE)
def test_writing_a_model_that_was_never_read(name: str, tmp_path: Path) -> None:
    model = random_model(name)
    model.save_pretrained(tmp_path / "theirs")
    skeleton = build_skeleton(config_of(name))
    skeleton.load_state_dict(dict(model.named_buffers()), strict=False)
    write_checkpoint(tmp_path / "ours", skeleton, skeleton.config, model.state_dict().__getitem__, dtypes={})
    assert equal(stored(tmp_path / "theirs"), stored(tmp_path / "ours"))


def saved(tmp_path: Path, name: str = "llama-tied", **changes: Any) -> Path:
    random_model(name, **changes).save_pretrained(tmp_path / "in")
    return tmp_path / "in"


def checked(directory: Path) -> list[str]:
    config = load_config(directory)
    with CheckpointReader(directory, build_skeleton(config)) as reader:
        return reader.check()


def rewrite(directory: Path, change: Any) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


NORM = "model.norm.weight"
EXPERT = "model.layers.0.block_sparse_moe.experts.3.w1.weight"


@pytest.mark.parametrize(
    ("model", "change", "message"),
    [
        (
            "llama-tied",
            lambda t: t.pop(NORM),
            r"1 of \d+ tensors of LlamaForCausalLM are missing \(model.norm.weight\)",
        ),
        ("llama-tied", lambda t: t.pop("model.embed_tokens.weight"), "missing .model.embed_tokens.weight"),
        (
            "llama-tied",
            lambda t: t.update({NORM: torch.ones(31)}),
            r"model.norm.weight is \(31,\) in the checkpoint and",
        ),
        ("llama-tied", lambda t: t.update({NORM: torch.ones(32).int()}), "is torch.int32 in the checkpoint"),
        ("llama-tied", lambda t: t.update({"a/b": torch.ones(1)}), r"tensor 'a/b' contains a path separator"),
        ("llama-tied", lambda t: t.update({"..\\b": torch.ones(1)}), r"contains a path separator"),
        ("llama-tied", lambda t: t.update({"lm_head.weight": torch.ones(97, 32)}), "stores different values; set"),
        ("mixtral", lambda t: t.pop(EXPERT), r"gate_up_proj (cannot be made|is \()"),
        ("mixtral", lambda t: t.update({EXPERT: torch.ones(2, 2)}), "gate_up_proj cannot be made of the tensors there"),
    ],
)
def test_a_wrong_checkpoint_is_refused(model: str, change: Any, message: str, tmp_path: Path) -> None:
    directory = saved(tmp_path, model)
    assert checked(directory) == []
    rewrite(directory, change)
    with pytest.raises(BadInput, match=message):
        checked(directory)


def test_equal_tied_values_and_unexpected_tensors_are_accepted(tmp_path: Path) -> None:
    directory = saved(tmp_path)
    rewrite(directory, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    rewrite(directory, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    rewrite(directory, lambda t: t.update({"extra.weight": torch.ones(4)}))
    assert checked(directory) == ["extra.weight"]


def test_an_untied_head_stored_where_the_tied_one_is_expected(tmp_path: Path) -> None:
    directory = saved(tmp_path)
    rewrite(directory, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    assert checked(directory) == []


def test_unusable_directories_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match="no such directory"):
        load_config(tmp_path / "nowhere")
    with pytest.raises(BadInput, match="no such directory"):
        load_config("./nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="is a file"):
        load_config(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="holds no config.json"):
        load_config(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "no-such-thing"}')
    with pytest.raises(BadInput, match=r"config.json cannot be used .*no-such-thing"):
        load_config(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("{")
    with pytest.raises(BadInput, match="cannot be used"):
        load_config(tmp_path / "empty")
    config_of("llama").save_pretrained(tmp_path / "empty")
    with pytest.raises(BadInput, match="holds no model.safetensors"):
        load_config(tmp_path / "empty")
    assert load_config(tmp_path / "empty", weights=False).vocab_size == 97
    (tmp_path / "empty" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(BadInput, match=r"pickled weights only.*save_pretrained"):
        load_config(tmp_path / "empty")
    with pytest.raises(BadInput, match="no causal language model"):
        build_skeleton(AutoConfig.for_model("vit"))


def test_own_code_is_never_run(tmp_path: Path) -> None:
    directory = saved(tmp_path)
    text = json.loads((directory / "config.json").read_text())
    text.update(model_type="own", auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"})
    (directory / "config.json").write_text(json.dumps(text))
    (directory / "own.py").write_text("raise SystemExit('run')")
    with pytest.raises(BadInput, match="cannot be used"):
        load_config(directory)


def test_a_quantised_checkpoint_is_refused(tmp_path: Path) -> None:
    directory = saved(tmp_path)
    text = json.loads((directory / "config.json").read_text())
    text["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (directory / "config.json").write_text(json.dumps(text))
    with pytest.raises(BadInput, match=r"quantised \(.*gptq.*original checkpoint"):
        load_config(directory)


def test_a_broken_shard_or_index_is_refused(tmp_path: Path) -> None:
    random_model("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    config = load_config(tmp_path)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(BadInput, match=f"{shard.name} is not a whole safetensors file"):
        CheckpointReader(tmp_path, build_skeleton(config))
    shard.unlink()
    with pytest.raises(BadInput, match=f"{shard.name} is missing"):
        load_config(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    with pytest.raises(BadInput, match="path separator"):
        load_config(tmp_path)
    index.write_text("{}")
    with pytest.raises(BadInput, match="not a safetensors index"):
        load_config(tmp_path)


def test_a_hub_id_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def offline(*_: object, **__: object) -> str:
        raise ConnectionError("Network is unreachable\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    monkeypatch.setattr(AutoConfig, "from_pretrained", offline)
    message = r"'org/name' is no directory here and could not be fetched from the hub \(Network is unreachable\)"
    with pytest.raises(BadInput, match=message):
        CheckpointReader("org/name", build_skeleton(config_of("llama")))
    with pytest.raises(BadInput, match=message):
        load_config("org/name")


def test_a_hub_id_reads_the_downloaded_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    directory = saved(tmp_path)
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with CheckpointReader("org/name", build_skeleton(load_config(directory))) as reader:
        assert reader.check() == []
    assert asked["name"] == "org/name"
    assert not any("bin" in pattern for pattern in asked["allow_patterns"])


def test_writing_leaves_nothing_half_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("llama")
    state = model.state_dict()
    out = tmp_path / "out"

    def broken(name: str) -> torch.Tensor:
        if "layers.2" in name:
            raise RuntimeError("the disk is gone")
        return state[name]

    with pytest.raises(RuntimeError, match="the disk is gone"):
        write_checkpoint(out, model, model.config, broken, dtypes={})
    assert list(tmp_path.iterdir()) == []

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(StoreError, match="No space left on device"):
            write_checkpoint(out, model, model.config, state.__getitem__, dtypes={})
    assert list(tmp_path.iterdir()) == []

    # what a killed run left is removed, what only looks like it is not
    ours, theirs = tmp_path / ".out.unfinished-1", tmp_path / ".out.unfinished-2"
    ours.mkdir()
    (ours / ".memopt-unfinished").touch()
    theirs.mkdir()
    out.mkdir()
    write_checkpoint(out, model, model.config, state.__getitem__, dtypes={})
    assert sorted(p.name for p in tmp_path.iterdir()) == [theirs.name, "out"]
    assert not list(out.glob(".*"))
    with pytest.raises(BadInput, match="exists already"):
        write_checkpoint(out, model, model.config, state.__getitem__, dtypes={})


def test_tokenizer_and_generation_config(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    directory = saved(tmp_path)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<u>": 0, "a": 1}, unk_token="<u>")), unk_token="<u>"
    )
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    generation = load_generation_config(directory)
    generation.temperature = 0.5  # invalid without sampling; older checkpoints come so, and it must not stop us
    for number, origin in enumerate([directory, str(directory), tokenizer]):
        out = tmp_path / f"out{number}"
        write_checkpoint(
            out,
            model,
            model.config,
            model.state_dict().__getitem__,
            dtypes={},
            tokenizer_from=origin,
            generation_config=generation,
        )
        again = transformers.AutoTokenizer.from_pretrained(out)
        assert again("a a")["input_ids"] == [1, 1]
        assert again.chat_template == tokenizer.chat_template
        assert json.loads((out / "generation_config.json").read_text())["temperature"] == 0.5
    assert load_generation_config(saved(tmp_path / "other")) is not None


@pytest.mark.parametrize("name", MODELS)
def test_decay_names_are_the_trainers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Trainer

    skeleton = build_skeleton(config_of(name))
    names = {n for n, _ in skeleton.named_parameters()}
    expected = set(Trainer.get_decay_parameter_names(None, skeleton)) & names
    assert decay_names(skeleton) == expected
    assert not any(n.endswith("bias") or "norm" in n.rsplit(".", 2)[-2] for n in expected)
    assert hf_init._trainer_patterns() is not None  # the installed version was understood
    monkeypatch.setattr(hf_init, "_trainer_patterns", lambda: None)
    assert decay_names(skeleton) == expected


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen3", "gemma3", "gpt2", "opt", "mixtral", "qwen3-moe"])
def test_random_init_draws_as_the_whole_model_does(name: str) -> None:
    wide = {"n_embd": 64} if name == "gpt2" else {"hidden_size": 64, "word_embed_proj_dim": 64}
    config = config_of(name, **wide)
    skeleton = build_skeleton(config)
    before = dict(skeleton.named_parameters())
    drawn: dict[str, torch.Tensor] = {}
    for part, names in parts(skeleton).items():
        made = random_init(skeleton, part, seed=3)
        assert set(made) == set(names)
        drawn |= made
    after = dict(skeleton.named_parameters())
    assert all(after[n] is before[n] and after[n].is_meta for n in before)
    reference = AutoModelForCausalLM.from_config(config)
    for n, whole in reference.named_parameters():
        mine = drawn[n]
        assert (mine.shape, mine.dtype) == (whole.shape, whole.dtype)
        if whole.std(correction=0) == 0:  # ones of norms, zeros of biases
            assert torch.equal(mine, whole), n
        elif whole.numel() >= 1000:
            assert mine.mean().abs() < 0.1 * whole.std(), n
            assert abs(mine.std() / whole.std() - 1) < 0.1, n
    # other order, state of the generator and company: the same values
    torch.manual_seed(99)
    for part in reversed(list(parts(skeleton))):
        again = random_init(skeleton, part, seed=3)
        assert equal(again, {n: drawn[n] for n in again})
    blocks = [part for part in parts(skeleton) if part[-1].isdigit()]
    one, two = (random_init(skeleton, part, seed=3) for part in blocks[:2])
    matrix = next(n for n in one if one[n].dim() > 1)
    assert not torch.equal(one[matrix], two[matrix.replace(blocks[0], blocks[1])])
    assert not torch.equal(one[matrix], random_init(skeleton, blocks[0], seed=4)[matrix])


def test_random_init_of_some_names_and_scaled_projections() -> None:
    skeleton = build_skeleton(config_of("gpt2", n_embd=128))
    block = random_init(skeleton, "transformer.h.1", 0)
    ratio = block["transformer.h.1.mlp.c_proj.weight"].std() / block["transformer.h.1.mlp.c_fc.weight"].std()
    assert abs(ratio * 6**0.5 - 1) < 0.05  # 1/sqrt(2 * 3 layers)
    only = random_init(skeleton, "", 0, names={"transformer.wpe.weight"})
    assert set(only) == {"transformer.wpe.weight"}
    with pytest.raises(BadInput, match="no submodule 'transformer.x'"):
        random_init(skeleton, "transformer.x", 0)


@pytest.mark.parametrize("remap_bytes", [hf_files.REMAP_BYTES, 1])
def test_files_open_one_at_a_time(remap_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_files, "REMAP_BYTES", remap_bytes)
    model = random_model("llama")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    skeleton = build_skeleton(load_config(tmp_path))

    def mapped() -> int:
        maps = Path("/proc/self/maps").read_text()
        return len({line.split()[-1] for line in maps.splitlines() if str(tmp_path) in line})

    with CheckpointReader(tmp_path, skeleton) as reader:
        assert mapped() == 0
        for name in reader.names():
            assert torch.equal(reader.read([name])[name], model.state_dict()[name])
            assert mapped() <= 1
    assert mapped() == 0
    with safe_open(next(tmp_path.glob("*.safetensors")), framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
