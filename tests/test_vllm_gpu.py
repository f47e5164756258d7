"""The GPU backend in Triton's interpreter on a CPU: memopt's kernel in whole engines, vLLM's kernels by themselves."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from memopt.patches.vllm_config import ThinKeys
from tests.vllm_helpers import Setup, farthest, make_setup

ABSENT = [name for name in ("vllm", "triton") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(bool(ABSENT), reason=f"{' and '.join(ABSENT)} not installed; make test-vllm"),
]

# vLLM turns Triton off where there is no GPU, so the kernels' modules are imported with it put back, in a new process
CODE = """
import sys
from types import SimpleNamespace
import torch, triton, triton.language as tl
import vllm.triton_utils as utils
utils.triton, utils.tl, utils.HAS_TRITON = triton, tl, True
from memopt.kv.channels import choose, complement
from memopt.kv.paged import pick
from memopt.patches import vllm_channels
from memopt.patches.vllm_config import ThinKeys
from memopt.patches.vllm_gpu import ThinDiffKVImpl, ThinTritonBackend, TritonAttentionDiffKVBackend
from tests.reference.paged import causal

D, keep, H, K, page = 64, int(sys.argv[1]), 6, 2, 16
torch.manual_seed(keep)
kept = choose(torch.rand(K, D), keep)
dropped = complement(kept, D)
impl = object.__new__(ThinDiffKVImpl)
impl._keys = ThinKeys(key_keep=1.0)
TritonAttentionDiffKVBackend.set_head_size_v(D)
for name, value in dict(head_size=keep, num_heads=H, num_kv_heads=K, scale=D**-0.5, kv_cache_dtype="auto",
                        alibi_slopes=None, use_alibi_sqrt=False, sliding_window=(-1, -1), logits_soft_cap=0,
                        sinks=None).items():
    setattr(impl, name, value)
layer = SimpleNamespace(_k_scale=torch.tensor(1.0), _v_scale=torch.tensor(1.0))
setattr(layer, vllm_channels._ATTRIBUTE, vllm_channels.LayerChannels(torch.cat((kept, dropped), 1), keep))
cache = torch.zeros(12, K, page, keep + D)
table = torch.tensor([[3, 7, 1], [9, 2, 4]], dtype=torch.int32)
past = [(torch.zeros(0, K, D), torch.zeros(0, K, D)) for _ in range(2)]
worst = 0.0
for lengths in ([37, 20], [1, 1], [3, 1]):  # prompts, a step, a chunk beside a step
    q, k, v = torch.randn(sum(lengths), H, D), torch.randn(sum(lengths), K, D), torch.randn(sum(lengths), K, D)
    slots, want, seen, begin = [], [], [], 0
    for i, n in enumerate(lengths):
        keys, values = (torch.cat((old, new[begin:begin + n])) for old, new in zip(past[i], (k, v)))
        slots += [int(table[i, p // page]) * page + p % page for p in range(len(keys) - n, len(keys))]
        past[i] = (keys, values)
        want.append(causal(q[begin:begin + n], keys, values, kept, torch.zeros(len(keys)), D**-0.5))
        seen.append(len(keys))
        begin += n
    impl.do_kv_cache_update(layer, k, v, cache, torch.tensor(slots))
    starts = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32)
    step = SimpleNamespace(
        num_actual_tokens=len(q), query_start_loc=starts, seq_lens=torch.tensor(seen, dtype=torch.int32),
        block_table=table, max_query_len=max(lengths), seq_threshold_3D=None, num_par_softmax_segments=None,
        softmax_segm_output=None, softmax_segm_max=None, softmax_segm_expsum=None)
    out = torch.zeros(len(q), H, D)
    impl.forward(layer, q, k, v, cache, step, out)
    worst = max(worst, (out - torch.cat(want)).abs().max().item())
assert ThinTritonBackend.get_name() == "CUSTOM"
print("worst", worst)
"""


@pytest.mark.parametrize("keep", [32, 40])
def test_thin_pages_through_vllms_kernels(run_python: Callable[..., Any], keep: int) -> None:
    done = run_python(CODE, str(keep), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr[-3000:]
    worst = float(done.stdout.split("worst")[-1])
    assert worst < 5e-6


@pytest.mark.filterwarnings("ignore")  # those of vLLM's imports
def test_steps_of_one_token_keep_their_addresses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What a CUDA graph captured must be where the next step is described."""
    from memopt.patches.vllm_gpu import ThinOwnBuilder

    keys = ThinKeys(key_keep=0.5, channels=tmp_path / "keys", recent=8)
    for name, text in keys.environment().items():
        monkeypatch.setenv(name, text)
    model = SimpleNamespace(get_num_attention_heads=lambda _: 8, get_num_kv_heads=lambda _: 2)
    parts = SimpleNamespace(max_num_seqs=16)
    config = SimpleNamespace(model_config=model, parallel_config=None, scheduler_config=parts)
    builder = ThinOwnBuilder(SimpleNamespace(num_kv_heads=2), ["layer"], config, torch.device("cpu"))

    def step(lengths: list[int], new: int) -> Any:
        many = len(lengths)
        common = SimpleNamespace(
            max_query_len=new,
            num_reqs=many,
            max_seq_len=1000,
            query_start_loc=torch.arange(many + 1, dtype=torch.int32) * new,
            query_start_loc_cpu=torch.arange(many + 1, dtype=torch.int32) * new,
            seq_lens=torch.tensor(lengths, dtype=torch.int32),
            seq_lens_cpu_upper_bound=torch.tensor(lengths, dtype=torch.int32),
            block_table_tensor=torch.zeros(many, 4, dtype=torch.int32),
        )
        return builder.build(0, common)

    first, second = step([5, 20, 1, 0], 1), step([300, 9, 30, 7], 1)
    assert second.exact_from.tolist() == [291, 0, 21, 0]
    for one in (first, second):
        assert one.prompts == []
        (launch,) = one.launches
        assert launch.tiles.tolist() == [[0, 0], [1, 0], [2, 0], [3, 0]]
        assert launch.splits == 4  # of the 32 programs that the interpreter is given, 8 are there
    assert first.exact_from.data_ptr() == second.exact_from.data_ptr()
    assert first.launches[0].tiles.data_ptr() == second.launches[0].tiles.data_ptr()
    many = step([40, 40], 20)
    assert [len(each.tiles) for each in many.launches] == [6]  # 32 rows are 8 queries of 4 heads
    assert many.exact_from.tolist() == [12, 12]


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    sizes: dict[str, Any] = {"lengths": (4, 267, 67, 1, 40), "new_tokens": 6, "program": "tests.vllm_gpu_engine"}
    return make_setup(tmp_path_factory.mktemp("gpu"), **sizes)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of transformers as vLLM wants it
@pytest.mark.parametrize(
    ("keep", "options", "second_runner"),
    [
        (0.625, {}, True),
        (0.625, {"recent": 16}, True),
        (0.5, {"recent": 16, "exact_prefill": True}, False),
    ],
)
def test_an_engine_with_memopts_kernel_gives_the_masked_references_logprobs(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, keep: float, options: dict[str, Any], second_runner: bool
) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", str(int(second_runner)))
    keys = ThinKeys(key_keep=keep, channels=setup.channels(keep), **options)
    # all prompts do not fit in a step: some are computed beside single tokens of others, in chunks where that is exact
    whole = {"max_model_len": 280, "max_num_batched_tokens": 280, "enable_chunked_prefill": False}
    beside = {"max_num_batched_tokens": 128} if keys.exact_prefill else whole
    found = setup.run(keys, block_size=16, kv_cache_memory_bytes=8 * 2**20, **beside)
    assert found["second_runner"] == second_runner
    tokens, logprobs = setup.reference(keys)
    assert found["passes"][0]["tokens"] == tokens
    assert farthest(found, logprobs) < 1e-5


@pytest.mark.slow
def test_exact_prefill_is_refused_where_a_preempted_request_would_read_other_blocks(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    keys = ThinKeys(key_keep=0.5, channels=setup.channels(0.5), recent=16, exact_prefill=True)
    assert "needs vLLM's V1 model runner" in setup.fail(keys)
