"""One layer's thin cache: what it holds, how it is pruned, and attention over it. No framework but torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from memopt.errors import BadInput
from memopt.kv.attention import causal_mask, queries_at_once, thin_attention
from memopt.kv.channels import channel_scores, choose, complement, kept_count, take
from memopt.kv.joint import drop_order, set_errors
from memopt.kv.quantized import Along, Codec, QuantizedRows
from memopt.kv.rows import Rows
from memopt.kv.settings import ThinSettings
from memopt.kv.window import Window, surviving_tokens, value_scores


class ThinState:
    """The pruned cache of one layer. Made by `prune` from a prompt's keys and values; then grows by `append`.

    Shapes: B batch, H query heads, K key-value heads, T tokens, D and Dv channels of a head's key and value.
    """

    def __init__(
        self, settings: ThinSettings, key: Tensor, value: Tensor, kept: Tensor, value_kept: Tensor | None
    ) -> None:
        """An empty cache for keys and values like `key` (B, K, ?, D) and `value`, keeping channels `kept` (B, K, C)."""
        self._settings = settings
        self._value_dim = value.shape[3]
        dropped = complement(kept, key.shape[3])
        # int16 at rest; the kept channels first, so that one gather of the queries serves both parts of the keys
        self._order = torch.cat([kept, dropped], -1).to(torch.int16)
        self._kept_count = kept.shape[2]
        self._value_kept = None if value_kept is None else value_kept.to(torch.int16)
        width = self._value_dim if value_kept is None else value_kept.shape[2]
        bits = settings.bits
        self._keys: Rows | QuantizedRows
        self._values: Rows | QuantizedRows
        if bits is None:
            self._keys, self._values = Rows.like(key, self._kept_count), Rows.like(value, width)
        else:
            self._keys = QuantizedRows(
                key, self._kept_count, Codec(bits=bits, along=Along.TOKENS), whole=settings.recent
            )
            self._values = QuantizedRows(value, width, Codec(bits=bits, along=Along.CHANNELS), whole=settings.recent)
        self._tail = Rows.like(key, dropped.shape[2])
        self._valid: Tensor | None = None  # (B, K, rows of the prompt) bool, where eviction left padding
        self._prompt_rows = 0  # rows that eviction left, 0 without eviction
        self._evicted = 0  # tokens that are gone
        self._since_fold = 0

    @classmethod
    def prune(
        cls,
        settings: ThinSettings,
        key: Tensor,  # (B, K, T, D), the prompt's, after rotary embedding
        values: Rows,  # the prompt's, (B, K, T, Dv); taken over, or emptied
        window: Window,
        *,
        scaling: float,
        real: Tensor | None = None,  # (B, T) bool, False at padding
        asked: Window | None = None,  # the queries of score="joint"
        kept: Tensor | None = None,  # (K, C), static channels instead of this prompt's own
    ) -> ThinState:
        """The thin cache of a prompt."""
        value = values.view()
        whole = key
        valid: Tensor | None = None
        evicted = 0
        tail_real = real
        if settings.evict is not None and settings.evict < key.shape[2]:
            survivors = surviving_tokens(
                window, key, real, capacity=settings.evict, newest=settings.newest, scaling=scaling
            )
            value_channels = cls._choose_values(settings, window, key, value, real, scaling)
            evicted = key.shape[2] - settings.evict
            key, value = _rows_at(key, survivors), _rows_at(value, survivors)
            values = Rows.like(value, value.shape[3])
            values.append(value)
            if real is not None:
                valid = real[:, None].expand(-1, key.shape[1], -1).gather(2, survivors)
                # the newest tokens are the same in every head, and the last rows
                tail_real = valid[:, 0]
        else:
            value_channels = cls._choose_values(settings, window, key, value, real, scaling)
        if kept is None:
            count = kept_count(key.shape[3], settings.key_keep, multiple=settings.multiple)
            if asked is None:
                scores = channel_scores(
                    window.query, key, query_real=window.real, key_real=valid if valid is not None else real
                )
            else:
                survived = {"pruned": key, "pruned_real": valid} if evicted else {}
                errors = set_errors(asked, whole, real, scaling=scaling, recent=settings.recent, **survived)
                scores = drop_order(errors, key.shape[3] - count)
            kept = choose(scores, count)
        else:
            kept = kept.to(key.device).expand(key.shape[0], -1, -1)
        del whole
        made = cls(settings, key, value, kept, value_channels)
        made._take_values(values, value_channels)
        del value, values
        made._keys.append(take(key, kept))
        made._tail.append(_tail_of(key, complement(kept, key.shape[3]), tail_real, settings.recent))
        if evicted:
            made._valid, made._prompt_rows, made._evicted = valid, key.shape[2], evicted
        return made

    @property
    def tokens(self) -> int:
        """Tokens seen, also those that eviction took."""
        return self._keys.length + self._evicted

    @property
    def rows(self) -> int:
        """Tokens held."""
        return self._keys.length

    @property
    def whole_rows(self) -> int:
        """The newest tokens of which all channels are held."""
        return self._tail.length

    def append(self, key: Tensor, value: Tensor) -> None:
        """Add tokens (B, K, N, D) whole, and fold older ones if that is the policy."""
        order = self._order.long()
        self._keys.append(take(key, order[..., : self._kept_count]))
        self._tail.append(take(key, order[..., self._kept_count :]))
        self._values.append(value if self._value_kept is None else take(value, self._value_kept.long()))
        self._since_fold += key.shape[2]
        settings = self._settings
        if settings.fold == "prune" and self._since_fold >= settings.block:
            self._tail.drop_front(max(0, self._tail.length - settings.recent))
            self._since_fold = 0

    def attend(
        self, query: Tensor, mask: Tensor | None, *, scaling: float, softcap: float | None = None, weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of the newest queries (B, H, Q, D): output (B, Q, H, Dv); weights (B, H, Q, rows) if wanted.

        `mask` is (B or 1, 1 or H, Q, at least `tokens`), bool or additive; None: causal, nothing padded.
        """
        batch, heads, count, _ = query.shape
        full = self._full_mask(mask, batch, heads, count, query.device)
        step = queries_at_once(batch, heads, self.rows)
        outputs, kept_weights = [], []
        for start in range(0, count, step):
            part = None if full is None else full[..., start : start + step, :]
            output, seen = thin_attention(
                query[:, :, start : start + step],
                self._keys.segments(),
                self._tail.view(),
                self._values.segments(),
                self._order,
                scaling=scaling,
                mask=part,
                softcap=softcap,
                value_channels=self._value_kept,
                value_dim=self._value_dim,
            )
            outputs.append(output)
            if weights:
                kept_weights.append(seen.to(query.dtype))
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
        return output, torch.cat(kept_weights, 2) if weights else None

    def crop(self, tokens: int) -> None:
        """Forget the last `tokens`.

        Raises:
            BadInput: tokens of a prompt that went through eviction, or rows that are quantised already.
        """
        if self._evicted and tokens > self._keys.length - self._prompt_rows:
            raise BadInput(
                f"cannot remove {tokens} tokens: eviction chose among the prompt's, and only the"
                f" {self._keys.length - self._prompt_rows} after it stand in order; use evict=None"
            )
        # the keys refuse first, before anything has changed
        self._keys.crop(tokens)
        self._values.crop(tokens)
        self._tail.crop(tokens)
        self._since_fold = max(0, self._since_fold - tokens)

    def map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        """Put another choice, order or number of batch rows in place: `change` maps tensors along dimension 0."""
        for part in (self._keys, self._values, self._tail):
            part.map_batch(change)
        self._order = change(self._order)
        self._value_kept = None if self._value_kept is None else change(self._value_kept)
        self._valid = None if self._valid is None else change(self._valid)

    def tensors(self) -> list[Tensor]:
        """Everything that holds memory."""
        small = [tensor for tensor in (self._order, self._value_kept, self._valid) if tensor is not None]
        return [*self._keys.tensors(), *self._tail.tensors(), *self._values.tensors(), *small]

    def kept_keys(self) -> Tensor:
        """The kept channels of each KV head, (B, K, C) int64."""
        return self._order[..., : self._kept_count].long()

    @staticmethod
    def _choose_values(
        settings: ThinSettings, window: Window, key: Tensor, value: Tensor, real: Tensor | None, scaling: float
    ) -> Tensor | None:
        count = kept_count(value.shape[3], settings.value_keep, multiple=settings.multiple)
        if count == value.shape[3]:
            return None
        return choose(value_scores(window, key, value, real, scaling), count)

    def _take_values(self, values: Rows, channels: Tensor | None) -> None:
        if channels is None and isinstance(self._values, Rows):
            self._values = values  # the prompt's buffer goes on as it is
            return
        self._values.append(values.view() if channels is None else take(values.view(), channels))

    def _full_mask(
        self, mask: Tensor | None, batch: int, heads: int, count: int, device: torch.device
    ) -> Tensor | None:
        """`mask` over the rows held, broadcastable to (B, K, G, Q, rows)."""
        kv_heads = self._order.shape[1]
        if mask is None:
            if self._valid is None and count == 1:
                return None
            full = causal_mask(count, self.rows, device)[None, None, None]
        else:
            mask = mask[..., : self.tokens]
            shaped = mask[:, :, None] if mask.shape[1] == 1 else mask.unflatten(1, (kv_heads, heads // kv_heads))
            if not self._evicted:
                return shaped
            # of the prompt, eviction has its own record of what is padding; the mask speaks for what came after
            later = shaped[..., self._evicted + self._prompt_rows :]
            earlier = later.new_ones(*later.shape[:-1], self._prompt_rows)
            full = torch.cat([earlier if later.dtype == torch.bool else earlier - 1.0, later], -1)
        if self._valid is None:
            return full
        there = torch.nn.functional.pad(self._valid, (0, self.rows - self._prompt_rows), value=True)[:, :, None, None]
        if full.dtype == torch.bool:
            return full & there
        return full.masked_fill(~there, torch.finfo(full.dtype).min)


def _rows_at(x: Tensor, positions: Tensor) -> Tensor:
    """x (B, K, T, C) at positions (B, K, N): (B, K, N, C)."""
    return x.gather(2, positions[..., None].expand(-1, -1, -1, x.shape[3]))


def _tail_of(key: Tensor, dropped: Tensor, real: Tensor | None, recent: int) -> Tensor:
    """The dropped channels of each row's last `recent` real tokens: (B, K, R, D - C), the last R tokens of `key`.

    With padding at the end, R spans every row's last real tokens; what a row has pruned is zero there and adds nothing.
    """
    tokens = key.shape[2]
    if real is None:
        return take(key[:, :, max(0, tokens - recent) :], dropped)
    after = real.flip(1).cumsum(1).flip(1)
    whole = real & (after <= recent)
    first = int(whole.any(0).to(torch.int8).argmax()) if bool(whole.any()) else tokens
    return take(key[:, :, first:], dropped) * whole[:, None, first:, None]
