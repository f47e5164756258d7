"""transformers models seen as entry, blocks and exit; the tiled loss; rows of the input table."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from memopt.errors import BadInput
from memopt.offload.head import HeadLoss, Targets, Tile
from memopt.offload.model import first
from memopt.patches.hf_model import HFLayeredModel
from tests.offload_helpers import FAMILIES, batches, config_of, in_memory_model, one_thread  # noqa: F401


@pytest.mark.parametrize("family", FAMILIES)
def test_entry_blocks_and_exit_are_the_model(family: str) -> None:
    model = in_memory_model(config_of(family)).eval()
    layered = HFLayeredModel(model)
    for micro in batches(model.config.vocab_size, 1, accum=2, pad="left")[0]:
        with torch.no_grad():
            expected = model(
                input_ids=micro["input_ids"], attention_mask=micro["attention_mask"], use_cache=False
            ).logits
            entry = layered.enter(micro)
            hidden = entry.hidden
            for block, call in zip(layered.blocks, entry.calls, strict=True):
                hidden = first(block(hidden, *call.args, **call.kwargs))
            logits = layered.leave(hidden.flatten(0, 1).unsqueeze(0))
        assert logits.shape == (1, expected.shape[0] * expected.shape[1], expected.shape[2])
        torch.testing.assert_close(logits.view_as(expected), expected, rtol=1e-6, atol=1e-6)
    assert len(layered.blocks) == len(model.get_submodule(layered.blocks_path))
    inside = layered.block_prefix(0) + next(iter(layered.blocks[0].state_dict()))
    assert inside in model.state_dict()


@pytest.mark.parametrize("family", ["falcon", "bloom"])
def test_blocks_that_return_tuples_are_known(family: str) -> None:
    model = in_memory_model(config_of(family)).eval()
    layered = HFLayeredModel(model)
    entry = layered.enter(batches(model.config.vocab_size, 1)[0][0])
    assert layered.returns_tuple(entry.calls[0], entry.hidden)
    assert isinstance(layered.blocks[0](entry.hidden, *entry.calls[0].args, **entry.calls[0].kwargs), tuple)


def test_the_exit_takes_any_number_of_tokens_and_is_differentiable() -> None:
    model = in_memory_model(config_of("llama"))
    layered = HFLayeredModel(model)
    hidden = torch.randn(1, 300, 64, requires_grad=True)
    logits = layered.leave(hidden)
    assert logits.shape == (1, 300, 128)
    logits.sum().backward()
    assert hidden.grad is not None and bool(hidden.grad.abs().sum(-1).gt(0).all())


def test_the_model_is_whole_again_after_each_call() -> None:
    model = in_memory_model(config_of("gpt2")).eval()
    blocks = list(model.transformer.h)
    layered = HFLayeredModel(model)
    layered.enter(batches(128, 1)[0][0])
    layered.leave(torch.randn(1, 3, 64))
    with pytest.raises(RuntimeError):
        layered.leave(torch.randn(1, 3, 63))
    assert list(model.transformer.h) == blocks


# -- what is refused


class Block(nn.Module):
    def __init__(self, width: int = 8):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, hidden: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        out: torch.Tensor = self.linear(hidden)
        return out if scale is None else out * scale


class Toy(nn.Module):
    """A causal LM with transformers' conventions and one defect of one's choice."""

    _no_split_modules = ["Block"]

    def __init__(self, defect: str = ""):
        super().__init__()
        self.defect = defect
        self.embedding, self.head = nn.Embedding(16, 8), nn.Linear(8, 16, bias=False)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.scale = nn.Parameter(torch.ones(8))
        if defect == "shared parameter":
            self.layers[2].linear.weight = self.layers[0].linear.weight  # type: ignore[union-attr]
        if defect == "one block again and again":
            self.layers = nn.ModuleList([self.layers[0]] * 3)

    def get_input_embeddings(self) -> nn.Module:
        return self.head if self.defect == "no embedding" else self.embedding

    def get_output_embeddings(self) -> nn.Module | None:
        return None if self.defect == "no head" else self.head

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool = True,
    ) -> SimpleNamespace:
        hidden = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        layers = list(self.layers)[:2] if self.defect == "a block is skipped" else self.layers
        for layer in layers:
            if self.defect == "hidden state changed":
                hidden = hidden * 1.5
            kwargs = {"scale": self.scale} if self.defect == "differentiable argument" else {}
            hidden = layer(hidden, **kwargs)
        return SimpleNamespace(logits=self.head(hidden))


def test_the_toy_without_defect_is_taken() -> None:
    layered = HFLayeredModel(Toy())
    entry = layered.enter({"input_ids": torch.tensor([[1, 2]])})
    assert (len(entry.calls), entry.hidden.shape) == (3, (1, 2, 8))


@pytest.mark.parametrize(
    ("defect", "message"),
    [
        ("shared parameter", r"layers\.2\.linear\.weight is shared with layers\.0\.linear\.weight"),
        ("one block again and again", r"layers\.1\.linear\.weight is shared with layers\.0"),
        ("no embedding", "input embedding is a Linear"),
        ("no head", "output head is a NoneType.*not a causal LM"),
    ],
)
def test_models_that_cannot_be_streamed_are_refused_at_once(defect: str, message: str) -> None:
    with pytest.raises(BadInput, match=f"Toy: .*{message}"):
        HFLayeredModel(Toy(defect))


def test_no_blocks_are_found() -> None:
    class Blockless(Toy):
        _no_split_modules: list[str] = []

    class Unknown(Toy):
        _no_split_modules = ["SomethingElse"]

    for kind in (Blockless, Unknown):
        with pytest.raises(BadInput, match=f"{kind.__name__}: its decoder blocks cannot be found"):
            HFLayeredModel(kind())


@pytest.mark.parametrize(
    ("defect", "message"),
    [
        ("hidden state changed", "hidden state is changed between blocks 0 and 1"),
        ("differentiable argument", "block 0 is handed a differentiable tensor"),
        ("a block is skipped", "called 2 of 3 blocks"),
    ],
)
def test_models_that_misbehave_are_refused_when_run(defect: str, message: str) -> None:
    layered = HFLayeredModel(Toy(defect))
    with pytest.raises(BadInput, match=f"Toy: .*{message}"):
        layered.enter({"input_ids": torch.tensor([[1, 2]])})


# -- the loss


@dataclass
class LossCase:
    family: str
    changes: dict[str, Any]


LOSSES = {
    "llama": LossCase("llama", {}),
    "softcapped": LossCase("gemma2", {"final_logit_softcapping": 2.0}),
    "bias": LossCase("phi", {}),
    "scaled": LossCase("granite", {}),
    "gpt2": LossCase("gpt2", {}),
}


@pytest.mark.parametrize(
    ("name", "chunk_tokens", "tile_rows"),
    [
        *((name, tokens, rows) for name in LOSSES for tokens in (1000, 5) for rows in (128, 50)),
        ("softcapped", 1000, 1),
        ("bias", 1000, 1),
    ],
)
def test_the_tiled_loss_is_cross_entropy(name: str, chunk_tokens: int, tile_rows: int) -> None:
    model = in_memory_model(config_of(LOSSES[name].family, **LOSSES[name].changes))
    head = model.get_output_embeddings()
    layered = HFLayeredModel(model)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(17, 64, generator=generator) * 3
    index = torch.tensor([16, 0, 3, 4, 9, 11, 12])
    labels = torch.tensor([127, 0, 5, 5, 49, 50, 99])

    leaf = hidden.clone().requires_grad_()
    table = head.weight.detach().clone()
    logits = layered.leave(leaf[index].unsqueeze(0))[0]
    expected = nn.functional.cross_entropy(logits.float(), labels)
    expected.backward()
    weight_grad, bias = head.weight.grad.clone(), head.bias

    grads = {"hidden": torch.zeros_like(hidden), "table": torch.zeros_like(table)}
    bias_grad = None if bias is None else torch.zeros_like(bias)
    loss = HeadLoss(
        model=layered,
        targets=Targets(index, labels),
        hidden=hidden,
        hidden_grad=grads["hidden"],
        chunk_tokens=chunk_tokens,
        bias=None if bias is None else bias.detach(),
        bias_grad=bias_grad,
    )

    def tiles() -> list[Tile]:
        edges = [*range(0, 128, tile_rows), 128]
        return [Tile(a, b, table[a:b], grads["table"][a:b]) for a, b in zip(edges, edges[1:], strict=False)]

    if tile_rows == 128:
        loss.forward_backward(tiles()[0])
    else:
        for tile in tiles():
            loss.forward(tile)
        for tile in reversed(tiles()):
            loss.backward(tile)
    assert loss.loss() == pytest.approx(float(expected.detach()), rel=1e-6)
    torch.testing.assert_close(grads["hidden"], leaf.grad, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(grads["table"], weight_grad, rtol=1e-5, atol=1e-7)
    if bias is not None:
        torch.testing.assert_close(bias_grad, bias.grad, rtol=1e-5, atol=1e-7)


def test_the_loss_survives_extreme_logits() -> None:
    """A running log-sum-exp over tiles must not overflow where the whole would not."""
    model = in_memory_model(config_of("llama"))
    layered = HFLayeredModel(model)
    table = model.lm_head.weight.detach() * 3000
    hidden = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([1, 100, 5, 60])
    loss = HeadLoss(
        model=layered, targets=Targets(torch.arange(4), labels), hidden=hidden, hidden_grad=None, chunk_tokens=3
    )
    for a in (0, 32, 64, 96):
        loss.forward(Tile(a, a + 32, table[a : a + 32]))
    with torch.no_grad():
        model.lm_head.weight.copy_(table)
        expected = nn.functional.cross_entropy(layered.leave(hidden.unsqueeze(0))[0], labels)
    assert loss.loss() == pytest.approx(float(expected), rel=1e-6)
    assert loss.loss() > 50


# -- what a block costs


@pytest.mark.parametrize("family", ["llama", "mixtral", "falcon"])
def test_tracing_a_block_needs_no_memory_and_finds_its_activations(family: str) -> None:
    from memopt.offload.trace import trace_block
    from memopt.patches.hf_checkpoint import build_skeleton

    layered = HFLayeredModel(in_memory_model(config_of(family)))
    skeleton = HFLayeredModel(build_skeleton(config_of(family)))

    def traced(rows: int, columns: int) -> Any:
        entry = layered.enter({"input_ids": torch.zeros(rows, columns, dtype=torch.long)})
        with torch.no_grad():
            hidden, call = entry.hidden.detach(), entry.calls[0]
        return trace_block(skeleton.blocks[0], hidden, call, torch.float32)

    small, large = traced(1, 32), traced(4, 32)
    # at least the recomputed hidden states of attention and feed-forward are alive at once
    assert small.backward_bytes > 32 * 64 * 4 * 4
    assert small.forward_bytes < small.backward_bytes
    assert 2 < large.backward_bytes / small.backward_bytes < 4.5
