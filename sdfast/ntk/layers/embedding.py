"""Embeddings: the gradient of sample i adds Bᵢₜ to the row of its token t."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sdfast.ntk.layers.linear import positions
from sdfast.ntk.layers.rule import Call, NamedRule, Rule, Slot, along_samples


def _added_to_rows(tokens: Tensor, values: Tensor, rows: int) -> Tensor:
    """(samples, rows, d) with values (samples, T, d) added at tokens (samples, T); negative ones are left out."""
    samples, _, width = values.shape
    table = values.new_zeros(samples * rows, width)
    kept = tokens >= 0
    offsets = torch.arange(samples, device=tokens.device)[:, None] * rows
    table.index_put_(((tokens + offsets)[kept],), values[kept], accumulate=True)
    return table.view(samples, rows, width)


class _Lookup(NamedRule):
    """What embeddings have in common: tokens (samples, T), and values (samples, T, d) that their rows receive."""

    def spread(self, call: Call, given: dict[str, Any], gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens, negative for padding, and values."""
        raise NotImplementedError

    def row(self, call: Call, given: dict[str, Any], name: str, gradient: Tensor) -> Tensor:
        tokens, values = self.spread(call, given, gradient)
        return _added_to_rows(tokens, values, len(call.flat[given["weight"].place]))

    def factors(self, call: Call, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return self.spread(call, self.bound(call), call.split_gradient(gradient, 0))

    @staticmethod
    def without_padding(call: Call, given: dict[str, Any], tokens: Tensor) -> Tensor:
        """Tokens with -1 for the padding."""
        padding = given["padding_idx"]
        if padding is None:
            return tokens.long()
        return tokens.long().masked_fill(tokens == padding % len(call.flat[given["weight"].place]), -1)


class EmbeddingRule(_Lookup):
    """``F.embedding``."""

    name = "embedding"

    @staticmethod
    def arguments(
        input: Any,
        weight: Any,
        padding_idx: int | None = None,
        max_norm: Any = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> dict[str, Any]:
        plain = max_norm is None and not scale_grad_by_freq
        return {"input": input, "weight": weight, "padding_idx": padding_idx, "plain": plain}

    def serves(self, call: Call) -> bool:
        given = self.bound(call)
        output = call.outputs[0]
        features = call.flat[given["input"].place].dim() if isinstance(given["input"], Slot) else 0
        return bool(
            given["plain"] and along_samples(call, given, ("weight",)) and output is not None and output.axis < features
        )

    def spread(self, call: Call, given: dict[str, Any], gradient: Tensor) -> tuple[Tensor, Tensor]:
        tokens = call.split(given["input"].place).flatten(1)
        return self.without_padding(call, given, tokens), positions(gradient)


class EmbeddingBagRule(_Lookup):
    """``F.embedding_bag`` of (bags, tokens) by sum or mean; per-token weights of the samples allowed."""

    name = "embedding bag"

    @staticmethod
    def arguments(
        input: Any,
        weight: Any,
        offsets: Any = None,
        max_norm: Any = None,
        norm_type: float = 2,
        scale_grad_by_freq: bool = False,
        mode: str = "mean",
        sparse: bool = False,
        per_sample_weights: Any = None,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
    ) -> dict[str, Any]:
        plain = max_norm is None and not scale_grad_by_freq and offsets is None and mode in ("sum", "mean")
        return {
            "input": input,
            "weight": weight,
            "mode": mode,
            "scales": per_sample_weights,
            "padding_idx": padding_idx,
            "plain": plain,
        }

    def serves(self, call: Call) -> bool:
        given = self.bound(call)
        source, weight, scales = given["input"], given["weight"], given["scales"]
        if not given["plain"] or not isinstance(source, Slot) or call.flat[source.place].dim() != 2:
            return False
        lying = {source.place} | ({scales.place} if isinstance(scales, Slot) else set())
        output = call.outputs[0]
        return (
            set(call.inputs) == lying
            and set(call.tracked) == {weight.place}
            and output is not None
            and output.axis == 0
            and all(axis.axis == 0 for axis in call.inputs.values())
        )

    def spread(self, call: Call, given: dict[str, Any], gradient: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.without_padding(call, given, call.split(given["input"].place))  # (samples, bags, bag)
        values = gradient[:, :, None, :].expand(*tokens.shape, gradient.shape[-1])
        if given["scales"] is not None:
            values = values * call.split(given["scales"].place)[..., None]
        elif given["mode"] == "mean":
            values = values / (tokens >= 0).sum(-1).clamp(min=1)[..., None, None]
        return tokens.flatten(1), positions(values)


RULES: list[tuple[Rule, tuple[Callable, ...]]] = [
    (EmbeddingRule(), (functional.embedding,)),
    (EmbeddingBagRule(), (functional.embedding_bag,)),
]
