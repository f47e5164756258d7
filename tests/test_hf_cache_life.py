"""What happens to a ThinKCache besides decoding: beams, crops, turns, chunks, drafts; undo."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    PreTrainedModel,
)

from memopt import ThinKCache
from memopt.errors import BadInput
from memopt.patches import hf_attention
from tests.kv_models import padded, sequences, some_steps, step_logits, tiny_model

SETTINGS: dict[str, Any] = {"key_keep": 0.5, "observation": 6, "recent": 8}


def agree(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=0.0)


def feed(model: PreTrainedModel, cache: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(ids, past_key_values=cache).logits
    return logits


def prompt(length: int = 50, batch: int = 1) -> Tensor:
    return torch.stack(sequences([length] * batch))


def generate(model: PreTrainedModel, cache: Any, **options: Any) -> Tensor:
    ids, mask = padded(sequences((40, 31)), "left")
    done: Tensor = model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=12, do_sample=False, **options
    )
    return done


def test_generate_with_everything_kept() -> None:
    model = tiny_model()
    expected = generate(model, DynamicCache(config=model.config))
    with ThinKCache(model, key_keep=1.0) as cache:
        assert torch.equal(generate(model, cache), expected)


def test_beam_search_with_everything_kept() -> None:
    model = tiny_model()
    expected = generate(model, DynamicCache(config=model.config), num_beams=4)
    with ThinKCache(model, key_keep=1.0) as cache:
        assert torch.equal(generate(model, cache, num_beams=4), expected)
    with ThinKCache(model, fold="prune", evict=20, value_keep=0.5, **SETTINGS) as cache:
        assert generate(model, cache, num_beams=3).shape == (2, 52)


@pytest.mark.parametrize(
    "extra", [{}, {"evict": 20, "value_keep": 0.5}, {"storage": "int8"}, {"prompt_tokens": 51}], ids=str
)
def test_batch_rows_go_where_they_are_sent(extra: dict[str, Any]) -> None:
    model = tiny_model()
    ids, mask = padded(sequences((44, 50)), "left")
    step = some_steps(2, (1,))[0]
    lengthened = torch.cat([mask, mask.new_ones(2, 1)], 1)
    changes: list[tuple[list[int], Callable[[Any], None]]] = [
        ([1, 0], lambda cache: cache.reorder_cache(torch.tensor([1, 0]))),
        ([0, 0, 1, 1], lambda cache: cache.batch_repeat_interleave(2)),
        ([1], lambda cache: cache.batch_select_indices(torch.tensor([1]))),
    ]
    for rows, change in changes:
        with ThinKCache(model, **SETTINGS, **extra) as cache, torch.no_grad():
            model(ids, attention_mask=mask, past_key_values=cache)
            expected = model(step, attention_mask=lengthened, past_key_values=cache).logits[rows]
        with ThinKCache(model, **SETTINGS, **extra) as cache, torch.no_grad():
            model(ids, attention_mask=mask, past_key_values=cache)
            change(cache)
            got = model(step[rows], attention_mask=lengthened[rows], past_key_values=cache).logits
            agree(got, expected)


@pytest.mark.parametrize("extra", [{}, {"evict": 20}, {"value_keep": 0.5}], ids=str)
def test_cropped_tokens_leave_no_trace(extra: dict[str, Any]) -> None:
    model = tiny_model()
    more, step = some_steps(1, (5,))[0], some_steps(1, (2,))[0]
    with ThinKCache(model, **SETTINGS, **extra) as cache:
        feed(model, cache, prompt())
        expected = feed(model, cache, step)
    with ThinKCache(model, **SETTINGS, **extra) as cache:
        feed(model, cache, prompt())
        feed(model, cache, more)
        cache.crop(-5)
        assert cache.get_seq_length() == 50
        agree(feed(model, cache, step), expected)
        cache.crop(-10_000)
        assert cache.get_seq_length() == 0
        agree(feed(model, cache, prompt()), feed(model, DynamicCache(config=model.config), prompt()))


def test_crop_into_the_pruned_part() -> None:
    """Cropping goes through the whole suffix into what was pruned; what is left attends as if it were all there."""
    model = tiny_model()
    with ThinKCache(model, **SETTINGS) as cache:
        feed(model, cache, prompt())
        cache.crop(-20)
        assert cache.get_seq_length() == 30 and cache.layers[0].state.whole_rows == 0
        assert torch.isfinite(feed(model, cache, some_steps(1, (3,))[0])).all()
        assert cache.layers[0].state.whole_rows == 3


def test_crop_that_cannot_be() -> None:
    model = tiny_model()
    with ThinKCache(model, evict=20, **SETTINGS) as cache:
        feed(model, cache, prompt())
        feed(model, cache, some_steps(1, (2,))[0])
        with pytest.raises(BadInput, match="cannot remove 3 tokens: eviction chose.*only the 2 after it"):
            cache.crop(-3)
    with ThinKCache(model, storage="int8", **SETTINGS) as cache:
        feed(model, cache, prompt(64))
        with pytest.raises(BadInput, match="cannot remove 40 tokens from a quantised cache.*last 32"):
            cache.crop(-40)
        assert cache.get_seq_length() == 64


def test_crop_before_pruning() -> None:
    model = tiny_model()
    with ThinKCache(model, prompt_tokens=50, **SETTINGS) as cache:
        feed(model, cache, prompt()[:, :45])
        cache.crop(-5)
        feed(model, cache, prompt()[:, 40:])
        got = feed(model, cache, some_steps(1, (1,))[0])
    with ThinKCache(model, **SETTINGS) as cache:
        feed(model, cache, prompt())
        agree(got, feed(model, cache, some_steps(1, (1,))[0]))


@pytest.mark.parametrize("extra", [{}, {"evict": 30, "value_keep": 0.5}], ids=str)
@pytest.mark.parametrize("chunk", [7, 16, 49])
def test_chunks_of_the_prompt_make_no_difference(chunk: int, extra: dict[str, Any]) -> None:
    model = tiny_model()
    step = some_steps(1, (1,))[0]
    with ThinKCache(model, **SETTINGS, **extra) as cache:
        feed(model, cache, prompt())
        expected = feed(model, cache, step)
    with ThinKCache(model, prompt_tokens=50, **SETTINGS, **extra) as cache:
        for piece in prompt().split(chunk, 1):
            feed(model, cache, piece)
        agree(feed(model, cache, step), expected)
    # by hand
    with ThinKCache(model, prompt_tokens=10_000, **SETTINGS, **extra) as cache:
        for piece in prompt().split(chunk, 1):
            feed(model, cache, piece)
        assert cache.layers[0].state is None
        cache.prune()
        agree(feed(model, cache, step), expected)


def test_chunked_prefill_of_generate() -> None:
    model = tiny_model()
    with ThinKCache(model, **SETTINGS) as cache:
        expected = generate(model, cache)
    with ThinKCache(model, prompt_tokens=40, **SETTINGS) as cache:
        assert torch.equal(generate(model, cache, prefill_chunk_size=9), expected)


def test_turns() -> None:
    """A second prompt on a pruned cache goes through the same path, whatever its pieces."""
    model = tiny_model()
    second = some_steps(1, (19,))[0]
    with ThinKCache(model, **SETTINGS) as cache:
        feed(model, cache, prompt())
        whole = feed(model, cache, second)
    with ThinKCache(model, **SETTINGS) as cache:
        feed(model, cache, prompt())
        agree(torch.cat([feed(model, cache, piece) for piece in second.split(4, 1)], 1), whole)


def test_turns_of_generate() -> None:
    model = tiny_model()
    ids = prompt(40)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    with ThinKCache(model, key_keep=1.0) as cache:
        first = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **options)
        longer = torch.cat([first, some_steps(1, (9,))[0]], 1)
        got = model.generate(longer, attention_mask=torch.ones_like(longer), past_key_values=cache, **options)
    assert torch.equal(got, model.generate(longer, attention_mask=torch.ones_like(longer), **options))


@pytest.mark.parametrize("extra", [{}, {"storage": "int8"}], ids=str)
def test_one_prefix_many_continuations(extra: dict[str, Any]) -> None:
    model = tiny_model()
    one, two = some_steps(1, (3, 3))
    with ThinKCache(model, **SETTINGS, **extra) as cache:
        feed(model, cache, prompt())
        copied = copy.deepcopy(cache)
        expected = feed(model, cache, one)
    other = feed(model, copied, two)
    assert copied.get_seq_length() == 53 and not torch.equal(other, expected)
    copied.crop(-3)
    agree(feed(model, copied, one), expected)
    copied.close()
    assert not hf_attention.is_attached(model)
    with pytest.raises(BadInput, match="closed ThinKCache"):
        copy.deepcopy(copied)


def test_modes_can_alternate() -> None:
    model = tiny_model()
    with ThinKCache(model, **SETTINGS) as cache:
        with torch.inference_mode():
            model(prompt(), past_key_values=cache)
            cache.reorder_cache(torch.tensor([0]))
        feed(model, cache, some_steps(1, (3,))[0])
        with torch.inference_mode():
            model(some_steps(1, (1,))[0], past_key_values=cache)
        assert cache.get_seq_length() == 54


def test_assisted_generation() -> None:
    model, assistant = tiny_model(), tiny_model("mqa")
    ids = prompt(40)
    options: dict[str, Any] = {"max_new_tokens": 14, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    with ThinKCache(model, **SETTINGS) as cache:
        expected = model.generate(ids, past_key_values=cache, **options)
    with ThinKCache(model, prompt_tokens=40, **SETTINGS) as cache:
        got = model.generate(ids, past_key_values=cache, assistant_model=assistant, **options)
        assert torch.equal(got, expected)
    with ThinKCache(model, **SETTINGS) as cache, pytest.raises(BadInput, match="drafts.*prompt_tokens=input_ids"):
        model.generate(ids, past_key_values=cache, assistant_model=assistant, **options)


def test_two_caches_of_one_model_interleaved() -> None:
    model = tiny_model()
    steps = some_steps(1, (1, 1, 2))
    alone = []
    for length in (50, 33):
        with ThinKCache(model, **SETTINGS) as cache:
            alone.append(step_logits(model, cache, sequences((length,)), steps, "left"))
    with ThinKCache(model, **SETTINGS) as one, ThinKCache(model, **SETTINGS) as two:
        feed(model, one, sequences((50,))[0][None])
        feed(model, two, sequences((33,))[0][None])
        mixed = [(feed(model, one, step), feed(model, two, step)) for step in steps]
    for which in (0, 1):
        agree(torch.cat([pair[which] for pair in mixed], 1), alone[which])


def test_reset_makes_it_new() -> None:
    model = tiny_model()
    step = some_steps(1, (1,))[0]
    with ThinKCache(model, **SETTINGS) as cache:
        feed(model, cache, prompt())
        expected = feed(model, cache, step)
        cache.reset()
        assert cache.get_seq_length() == 0 and cache.cache_bytes() == 0
        feed(model, cache, prompt())
        agree(feed(model, cache, step), expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_leaving_restores_the_model(attention: str) -> None:
    model = tiny_model("llama", attention)
    expected = feed(model, DynamicCache(config=model.config), prompt())
    one = ThinKCache(model)
    two = ThinKCache(model)
    assert hf_attention.is_attached(model)
    # another cache, or none, is served as ever
    assert torch.equal(feed(model, DynamicCache(config=model.config), prompt()), expected)
    assert torch.equal(feed(model, None, prompt()), expected)
    one.close()
    one.close()
    assert hf_attention.is_attached(model)
    two.close()
    assert model.config._attn_implementation == attention
    assert torch.equal(feed(model, DynamicCache(config=model.config), prompt()), expected)


def test_a_forgotten_cache_restores_the_model() -> None:
    model = tiny_model()
    ThinKCache(model)
    gc.collect()
    assert model.config._attn_implementation == "sdpa"


def test_an_implementation_chosen_meanwhile_stands() -> None:
    model = tiny_model()
    with ThinKCache(model):
        model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"


def test_a_closed_cache_says_so() -> None:
    model = tiny_model()
    cache = ThinKCache(model)
    cache.close()
    with pytest.raises(BadInput, match="reached code that does not know it.*the cache was closed"):
        feed(model, cache, prompt())
    with pytest.raises(BadInput, match="ran without ThinKCache"):
        feed(model, cache, prompt())
