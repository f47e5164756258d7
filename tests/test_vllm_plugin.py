"""The plugin's settings, guards and seams, without starting an engine."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from memopt.errors import BadInput
from memopt.kv.channel_file import ChannelSets, ModelIdentity, save_channels
from memopt.patches import vllm_guard, vllm_plugin
from memopt.patches.vllm_channels import heads_of_rank, thin_spec
from memopt.patches.vllm_config import RECEIPT, ThinKeys, from_environment
from memopt.patches.vllm_guard import Receipt

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vllm is not installed; make test-vllm"
)
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]
MODEL = ModelIdentity(
    model_type="llama", layers=2, heads=4, kv_heads=2, head_dim=64, hidden_size=256, vocab_size=300, rope_theta=1e4
)


def keys_of(directory: Path, keep: float = 0.5, **options: Any) -> ThinKeys:
    path = directory / "keys.safetensors"
    sets = {layer: torch.arange(int(64 * keep)).expand(2, -1).contiguous() for layer in range(2)}
    save_channels(path, ChannelSets(model=MODEL, keep=keep, keys=sets))
    return ThinKeys(key_keep=keep, channels=path, **options)


def test_settings_survive_the_environment(tmp_path: Path) -> None:
    for keys in (
        ThinKeys(key_keep=1.0),
        ThinKeys(key_keep=0.3, channels=tmp_path / "a b", recent=7, exact_prefill=True, kernel="own"),
    ):
        assert from_environment(keys.environment()) == keys
    assert from_environment({"PATH": "x", RECEIPT: "y"}) is None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"MEMOPT_VLLM_KEY_KEEP": "much"}, "not a number"),
        ({"MEMOPT_VLLM_KEY_KEEP": "0"}, "not in (0, 1]"),
        ({"MEMOPT_VLLM_KEY_KEEP": "0.5"}, "needs a channel file"),
        ({"MEMOPT_VLLM_KEY_RECENT": "3"}, "is not"),
        ({"MEMOPT_VLLM_KEY_KEEP": "1", "MEMOPT_VLLM_KEY_RECENT": "-1"}, "negative"),
        ({"MEMOPT_VLLM_KEY_KEEP": "1", "MEMOPT_VLLM_KEYKEEP": "1"}, "not known"),
    ],
)
def test_variables_that_cannot_be_meant_are_refused(given: dict[str, str], words: str) -> None:
    with pytest.raises(BadInput, match=words.replace("(", r"\(")):
        from_environment(given)


@pytest.mark.parametrize(
    ("total", "world", "wanted"),
    [(8, 2, [(0, 4), (4, 8)]), (2, 4, [(0, 1), (0, 1), (1, 2), (1, 2)]), (4, 4, [(0, 1), (1, 2), (2, 3), (3, 4)])],
)
def test_ranks_take_their_own_heads(total: int, world: int, wanted: list[tuple[int, int]]) -> None:
    local = max(1, total // world)
    found = [heads_of_rank(total, local, world, rank) for rank in range(world)]
    assert [(each.start, each.stop) for each in found] == wanted


def config(**changed: Any) -> Any:
    text = {"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    text |= {"hidden_size": 256, "vocab_size": 300, "head_dim": 64, "rope_parameters": {"rope_theta": 1e4}}
    parallel = SimpleNamespace(
        decode_context_parallel_size=changed.get("dcp", 1), prefill_context_parallel_size=changed.get("pcp", 1)
    )
    return SimpleNamespace(
        speculative_config=changed.get("speculative"),
        kv_transfer_config=changed.get("transfer"),
        use_v2_model_runner=changed.get("v2", False),
        parallel_config=parallel,
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=changed.get("no_hybrid")),
        model_config=SimpleNamespace(
            is_mm_prefix_lm=changed.get("prefix_lm", False),
            rswa_window=None,
            use_mla=changed.get("mla", False),
            hf_config=SimpleNamespace(**text | changed.get("text", {})),
        ),
    )


def test_what_a_server_may_be_asked_for(tmp_path: Path) -> None:
    keys = keys_of(tmp_path)
    vllm_guard.check_config(config(), keys)
    vllm_guard.check_config(config(speculative=SimpleNamespace(method="ngram")), keys)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"speculative": SimpleNamespace(method="eagle")}, "draft model"),
        ({"transfer": object()}, "KV connector"),
        ({"dcp": 2}, "decode_context_parallel_size"),
        ({"pcp": 2}, "prefill_context_parallel_size"),
        ({"mla": True}, "MLA"),
        ({"prefix_lm": True}, "not plainly causal"),
        ({"text": {"vocab_size": 7}}, "another model"),
    ],
)
def test_what_thin_keys_cannot_do_is_refused_and_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], words: str
) -> None:
    monkeypatch.setenv(RECEIPT, str(tmp_path / "receipt"))
    with pytest.raises(BadInput, match=words):
        vllm_guard.check_config(config(**changed), keys_of(tmp_path))
    receipt = Receipt.load(tmp_path / "receipt")
    assert receipt is not None
    assert words in receipt.refused


class Ours:
    @staticmethod
    def get_name() -> str:
        return "OURS"


class Other(Ours):
    pass


def layer(**changed: Any) -> Any:
    given: dict[str, Any] = {
        "layer_name": "model.layers.0.attn",
        "attn_backend": Ours,
        "attn_type": "decoder",
        "sliding_window": None,
        "kv_sharing_target_layer_name": None,
        "head_size": 64,
        "head_size_v": 64,
        "kv_cache_dtype": "auto",
    }
    impl = {"alibi_slopes": None, "sinks": None, "logits_soft_cap": 0}
    impl |= {name: changed.pop(name) for name in list(changed) if name in impl}
    return SimpleNamespace(**given | changed, impl=SimpleNamespace(**impl))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"attn_backend": Other}, "does not know thin keys"),
        ({"attn_type": "encoder_only"}, "encoder_only"),
        ({"sliding_window": 32}, "window of 32"),
        ({"kv_sharing_target_layer_name": "x"}, "cache of x"),
        ({"head_size_v": 32}, "values of 32"),
        ({"kv_cache_dtype": "fp8"}, "fp8"),
        ({"alibi_slopes": [1.0]}, "ALiBi"),
        ({"sinks": 1}, "sinks"),
        ({"logits_soft_cap": 30.0}, "cap on the scores"),
    ],
)
def test_layers_that_would_not_be_thin_are_refused(changed: dict[str, Any], words: str) -> None:
    vllm_guard.check_layer(layer(), Ours)
    with pytest.raises(BadInput, match=words):
        vllm_guard.check_layer(layer(**changed), Ours)


def test_a_window_needs_groups_of_its_own_kind(tmp_path: Path) -> None:
    vllm_guard.check_config(config(no_hybrid=True), keys_of(tmp_path))
    with pytest.raises(BadInput, match="kept for all tokens"):
        vllm_guard.check_config(config(no_hybrid=True), keys_of(tmp_path, recent=8))
    vllm_guard.check_config(config(v2=True), keys_of(tmp_path, recent=8))
    with pytest.raises(BadInput, match="V1 model runner"):
        vllm_guard.check_config(config(v2=True), keys_of(tmp_path, recent=8, exact_prefill=True))


@needs_vllm
def test_a_layer_without_channels_is_refused_before_any_prompt(tmp_path: Path) -> None:
    keys = keys_of(tmp_path)
    vllm_guard.check_channels(layer(layer_name="model.layers.1.attn"), keys)
    with pytest.raises(BadInput, match=r"no channels for model\.layers\.7\.attn"):
        vllm_guard.check_channels(layer(layer_name="model.layers.7.attn"), keys)


@needs_vllm
def test_pages_that_are_not_thin_stop_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    monkeypatch.setenv(RECEIPT, str(tmp_path / "receipt"))
    keys = keys_of(tmp_path)
    stock = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.float32)
    thin = thin_spec(keys, stock)
    assert stock.page_size_bytes == 16 * 2 * 128 * 4
    assert thin.page_size_bytes == 16 * 2 * 96 * 4
    vllm_guard.check_specs([{"layers.0": thin}, {"layers.1": thin}], keys)
    receipt = Receipt.load(tmp_path / "receipt")
    assert receipt == Receipt(layers=2, head_size=64, kept=32, page_bytes=thin.page_size_bytes)
    for pages in ({"layers.0": thin, "layers.1": stock}, {"layers.0": SimpleNamespace()}):
        with pytest.raises(BadInput, match=r"layers\.[01]: pages of the kind"):
            vllm_guard.check_specs([pages], keys)
    with pytest.raises(BadInput, match="no layer"):
        vllm_guard.check_specs([{}], keys)
    with pytest.raises(BadInput, match="no recent window"):
        vllm_guard.check_specs([{"layers.0": thin}], keys_of(tmp_path, recent=8))


@needs_vllm
@pytest.mark.parametrize(("module", "name"), vllm_plugin.SEAMS)
def test_every_seam_is_there(module: str, name: str) -> None:
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    assert callable(found)


@needs_vllm
def test_signatures_are_those_the_overrides_were_written_for() -> None:
    import inspect

    from vllm.v1.attention.backend import AttentionMetadataBuilder
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, CPUAttentionMetadataBuilder
    from vllm.v1.attention.backends.triton_attn_diffkv import TritonAttentionDiffKVImpl
    from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
    from vllm.v1.kv_cache_interface import SlidingWindowSpec

    from memopt.patches.vllm_attention import ThinCPUBuilder, ThinCPUImpl
    from memopt.patches.vllm_gpu import ThinOwnBuilder, ThinOwnImpl
    from memopt.patches.vllm_spec import PromptWindowManager, PromptWindowSpec

    def names(function: Callable[..., Any]) -> list[str]:
        return list(inspect.signature(function).parameters)

    for ours, theirs, method in (
        (ThinCPUImpl, CPUAttentionBackendImpl, "forward"),
        (ThinCPUImpl, CPUAttentionBackendImpl, "do_kv_cache_update"),
        (ThinCPUBuilder, CPUAttentionMetadataBuilder, "__init__"),
        (ThinCPUBuilder, CPUAttentionMetadataBuilder, "build"),
        (ThinOwnImpl, TritonAttentionDiffKVImpl, "forward"),
        (ThinOwnImpl, TritonAttentionDiffKVImpl, "do_kv_cache_update"),
        (ThinOwnImpl, TritonAttentionDiffKVImpl, "fused_output_quant_supported"),
        (ThinOwnBuilder, AttentionMetadataBuilder, "__init__"),
        (ThinOwnBuilder, AttentionMetadataBuilder, "build"),
        (PromptWindowManager, SlidingWindowManager, "remove_skipped_blocks"),
        (PromptWindowSpec, SlidingWindowSpec, "max_admission_blocks_per_request"),
    ):
        assert names(getattr(ours, method)) == names(getattr(theirs, method)), method


@needs_vllm
def test_a_prompt_that_cannot_be_held_is_not_admitted() -> None:
    """A plain window would promise 2 + 1 blocks for a prompt that needs all of them until it is done."""
    from vllm.v1.kv_cache_interface import SlidingWindowSpec

    from memopt.patches.vllm_spec import PromptWindowSpec

    sizes: dict[str, Any] = {"block_size": 128, "num_kv_heads": 2, "head_size": 32, "head_size_v": 0}
    sizes |= {"dtype": torch.float32, "sliding_window": 17}
    asked = {"max_in_flight_tokens": 128, "max_model_len": 4096}
    assert SlidingWindowSpec(**sizes).max_admission_blocks_per_request(**asked) == 3
    assert PromptWindowSpec(**sizes).max_admission_blocks_per_request(**asked) == 33


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    yield monkeypatch
    vllm_plugin.unregister()


@needs_vllm
def test_without_settings_nothing_is_touched(clean: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.attention import Attention

    before = Attention.__init__
    vllm_plugin.register()
    assert Attention.__init__ is before


@needs_vllm
def test_registering_twice_is_once_and_unregistering_puts_everything_back(
    clean: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.core import kv_cache_utils

    member = AttentionBackendEnum.CPU_ATTN
    before = (Attention.__init__, kv_cache_utils.get_kv_cache_configs, member.get_path())
    for name, text in keys_of(tmp_path, recent=16, exact_prefill=True).environment().items():
        clean.setenv(name, text)
    vllm_plugin.register()
    once = (Attention.__init__, kv_cache_utils.get_kv_cache_configs, member.get_path())
    vllm_plugin.register()
    assert (Attention.__init__, kv_cache_utils.get_kv_cache_configs, member.get_path()) == once
    assert all(a != b for a, b in zip(before, once, strict=True))
    assert member.get_class().__name__ == "ThinCPUBackend"
    vllm_plugin.unregister()
    assert (Attention.__init__, kv_cache_utils.get_kv_cache_configs, member.get_path()) == before


@needs_vllm
def test_another_vllm_is_refused(clean: pytest.MonkeyPatch) -> None:
    import vllm

    clean.setattr(vllm, "__version__", "0.33.0")
    clean.setenv("MEMOPT_VLLM_KEY_KEEP", "1")
    with pytest.raises(BadInput, match=r"0\.33\.0 is not the 0\.32"):
        vllm_plugin.register()


@needs_vllm
def test_the_stock_kernel_is_taken_where_sizes_divide(tmp_path: Path) -> None:
    from memopt.patches.vllm_attention import takes_stock_kernel

    assert takes_stock_kernel(keys_of(tmp_path, 0.5), 64)
    assert not takes_stock_kernel(keys_of(tmp_path, 0.5, kernel="own"), 64)
    assert not takes_stock_kernel(keys_of(tmp_path, 0.5, recent=4), 64)
    three_quarters = tmp_path / "more"
    three_quarters.mkdir()
    assert not takes_stock_kernel(keys_of(three_quarters, 0.75), 64)
    with pytest.raises(BadInput, match="48 key channels of 64"):
        takes_stock_kernel(keys_of(three_quarters, 0.75, kernel="stock"), 64)
