"""One bank out of those of many processes."""

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from sdfast.ops.prediction_bank.bank import PredictionBank

CHUNK_ENTRIES = 1 << 22


@torch.no_grad()
def gather(bank: "PredictionBank", group: Any) -> None:
    """As `PredictionBank.gather` says: each row has one owner, all others add zeros to it, so nothing is rounded."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        raise RuntimeError("gather: torch.distributed is not initialised; call init_process_group")
    world, rank = distributed.get_world_size(group), distributed.get_rank(group)
    _refuse_banks_of_other_sizes(bank, group)
    # The most predictions since last time first, then the lowest rank.
    claim = (bank.seen - bank._seen_at_gather).long() * world + (world - 1 - rank)
    highest = claim.clone()
    distributed.all_reduce(highest, distributed.ReduceOp.MAX, group=group)
    owned = claim == highest
    step = max(1, CHUNK_ENTRIES // bank.predictions.shape[1])
    for begin in range(0, bank.num_samples, step):
        part = slice(begin, begin + step)
        for tensor in (bank.predictions, bank.classes, bank.seen):
            if tensor.numel() == 0:
                continue
            mine = owned[part] if tensor.dim() == 1 else owned[part, None]
            rows = torch.where(mine, tensor[part], 0)
            rows = rows.float() if rows.dtype == torch.bfloat16 else rows
            distributed.all_reduce(rows, group=group)
            tensor[part] = rows.to(tensor.dtype)
    bank._seen_at_gather.copy_(bank.seen)


def _refuse_banks_of_other_sizes(bank: "PredictionBank", group: Any) -> None:
    """On every process alike: sums over tensors of other sizes hang, or add up rows of different samples."""
    own = torch.tensor([bank.num_samples, bank.num_classes, bank.top_k or 0], device=bank.seen.device)
    extremes = torch.cat([own, -own])
    torch.distributed.all_reduce(extremes, torch.distributed.ReduceOp.MAX, group=group)
    largest, smallest = extremes[:3], -extremes[3:]
    for name, low, high in zip(
        ("num_samples", "num_classes", "top_k"), smallest.tolist(), largest.tolist(), strict=True
    ):
        if low != high:
            raise ValueError(f"{name}: the processes' banks have from {low} to {high}, wanted the same in all")
