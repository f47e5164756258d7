"""What the KV cache of a paged server holds, with whole and with thin keys: blocks, tokens, requests. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from memopt.forecast_types import Forecast, PhaseForecast
from memopt.tiers import Category, Tier
from memopt.units import GiB, format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """Sizes of a model in a server. `max_tokens`: of one request; `element_bytes`: of a number in the cache."""

    name: str
    weight_bytes: int
    layers: int
    kv_heads: int
    head_dim: int
    element_bytes: int
    max_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """What one layout of the pages holds. `requests`: at once, each of the longest length, one block being nobody's."""

    token_bytes: int
    blocks: int
    tokens: int
    requests: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ServePlan:
    """The cache of a server, stock and thin. `kv_bytes` None: vLLM takes what it finds; capacities are per GiB then."""

    model: ServedModel
    kept: int
    block_tokens: int
    kv_bytes: int | None
    stock: Capacity
    thin: Capacity

    @property
    def gain(self) -> float:
        """Tokens for the same memory, thin to stock."""
        return self.stock.token_bytes / self.thin.token_bytes

    def forecast(self, tier: Tier) -> Forecast:
        """As the other plans are saved."""
        use = {str(Category.WEIGHTS): self.model.weight_bytes}
        if self.kv_bytes is not None:
            use[str(Category.KV_CACHE)] = self.kv_bytes
        return Forecast(
            job="serve",
            verdict="unbounded",
            phases=(PhaseForecast(name="serve", use={str(tier): use}),),
            assumptions=(f"blocks of {self.block_tokens} tokens", f"{self.model.element_bytes} bytes a number"),
            reasons=tuple(self.lines()),
            config={"key_keep_channels": self.kept, "head_dim": self.model.head_dim},
        )

    def lines(self) -> list[str]:
        """The plan for reading."""
        model, per = self.model, "" if self.kv_bytes is not None else " for each GiB"
        room = "what vLLM finds free" if self.kv_bytes is None else format_bytes(self.kv_bytes)
        said = [f"{model.name}: weights {format_bytes(model.weight_bytes)}, KV cache {room}"]
        thinner = self.kept < model.head_dim
        thin = [(f"{self.kept} of {model.head_dim} key channels", self.thin)] if thinner else []
        for name, of in (("stock", self.stock), *thin):
            said.append(
                f"{name}: {format_bytes(of.token_bytes)} a token; {of.blocks} blocks, {of.tokens} tokens{per}; "
                f"{of.requests:.2f} requests of {model.max_tokens} tokens at once{per}"
            )
        return [*said, f"{self.gain:.3f} times the tokens in the same memory"] if thinner else said


def plan_serving(model: ServedModel, *, kept: int, block_tokens: int, kv_bytes: int | None) -> ServePlan:
    """Count pages as vLLM does: whole blocks over all layers."""
    room = GiB if kv_bytes is None else kv_bytes
    return ServePlan(
        model=model,
        kept=kept,
        block_tokens=block_tokens,
        kv_bytes=kv_bytes,
        stock=_capacity(model, model.head_dim, block_tokens, room),
        thin=_capacity(model, kept, block_tokens, room),
    )


def _capacity(model: ServedModel, key_width: int, block_tokens: int, room: int) -> Capacity:
    token_bytes = model.layers * model.kv_heads * (key_width + model.head_dim) * model.element_bytes
    blocks = room // (token_bytes * block_tokens)
    per_request = -(-model.max_tokens // block_tokens)
    return Capacity(
        token_bytes=token_bytes,
        blocks=blocks,
        tokens=blocks * block_tokens,
        requests=max(0, blocks - 1) / per_request,
    )
