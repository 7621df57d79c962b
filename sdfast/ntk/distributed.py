"""A Gram matrix shared by processes: each takes some groups of parameters, and one sum over all of them makes H.

Every process sees all samples; the gradients it holds and the products it makes are its share. A process that fails
tells the others before it raises, and one that is gone is noticed by the next exchange, so nobody waits for ever.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sdfast.ntk import costs
from sdfast.ntk.blocks import Group
from sdfast.ntk.plan import Plan
from sdfast.ntk.sample_rows import PathChangedError

_DONE, _PATH_CHANGED, _FAILED = range(3)
_CONTINUE = "started again with the same checkpoint=, all processes continue with the groups that are missing"


class Shards:
    """The processes of a group, and this one's place among them.

    Args:
        group: A ``torch.distributed`` process group, or ``None``: this process alone.
        device: Of the model.

    Raises:
        TypeError: `group` is no process group.
        ValueError: This process is not in it, or its backend does not serve the device.
        RuntimeError: torch.distributed is not initialised.
    """

    def __init__(self, group: Any, device: torch.device) -> None:
        self.group, self.device, self.rank, self.world = group, device, 0, 1
        if group is None:
            return
        distributed = torch.distributed
        if not distributed.is_available() or not distributed.is_initialized():
            raise RuntimeError("group: torch.distributed is not initialised; call init_process_group")
        if group is distributed.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("group: this process is not in it; call gram in the processes of the group alone")
        if not isinstance(group, distributed.ProcessGroup):
            raise TypeError(
                f"group: got {type(group).__name__}, wanted a process group such as torch.distributed.group.WORLD"
            )
        self.rank, self.world = distributed.get_rank(group), distributed.get_world_size(group)
        backend = distributed.get_backend(group)
        if backend == "nccl" and device.type != "cuda":
            raise ValueError(
                f"group: its backend is nccl and the model is on {device.type}; move the model, or use gloo"
            )

    def mine(self, plan: Plan) -> list[Group]:
        """The groups of parameters of this process: the heaviest first, each to who has least so far."""
        loads = [0.0] * self.world
        numbers: list[int] = []
        weights = [_weight(plan, group) for group in plan.groups]
        for number in sorted(range(len(weights)), key=lambda number: -weights[number]):
            rank = min(range(self.world), key=lambda rank: loads[rank])
            loads[rank] += weights[number]
            if rank == self.rank:
                numbers.append(number)
        return [plan.groups[number] for number in sorted(numbers)]

    def check_same(self, settings: Mapping[str, Any]) -> None:
        """Refuses processes that compute different matrices: on all of them alike.

        Raises:
            ValueError: A setting differs; it is named.
        """
        for rank, other in enumerate(self._gathered(dict(settings))):
            differing = [name for name in settings if other.get(name) != settings[name]]
            if differing:
                told = ", ".join(differing)
                raise ValueError(
                    f"group: rank {rank} and rank {self.rank} differ in {told}, wanted the same everywhere"
                )

    def any(self, here: bool) -> bool:
        """Whether it is so in any process."""
        return any(self._gathered(here))

    @contextmanager
    def together(self) -> Iterator[None]:
        """Work of each process, after which all know whether all got through it.

        Yields:
            Nothing.

        Raises:
            PathChangedError: Somewhere a micro-batch took another path; raised in every process.
            RuntimeError: Another process failed.
        """
        state, reason = _FAILED, ""
        try:
            yield
            state = _DONE
        except PathChangedError as error:
            state, reason = _PATH_CHANGED, str(error)
            raise
        finally:
            self._agree(state, reason)

    def add_up(self, total: Tensor) -> None:
        """The sum over all processes, in place, in every one: the one exchange of matrices."""
        if self.world == 1:
            return
        whole = total if total.is_contiguous() and total.device == self.device else total.to(self.device).contiguous()
        with _gone():
            torch.distributed.all_reduce(whole, group=self.group)
        if whole is not total:
            total.copy_(whole)

    def _agree(self, state: int, reason: str) -> None:
        states = self._gathered((state, reason))
        failed = [rank for rank, (other, _) in enumerate(states) if other == _FAILED]
        if failed and state != _FAILED:
            ranks = ", ".join(map(str, failed))
            raise RuntimeError(f"group: rank {ranks} failed and says why; {_CONTINUE}")
        changed = [told for other, told in states if other == _PATH_CHANGED]
        if changed and state == _DONE:
            raise PathChangedError(changed[0])

    def _gathered(self, value: Any) -> Sequence[Any]:
        if self.world == 1:
            return [value]
        gathered: list[Any] = [None] * self.world
        with _gone():
            torch.distributed.all_gather_object(gathered, value, group=self.group)
        return gathered


@contextmanager
def _gone() -> Iterator[None]:
    """Says what it means that an exchange fails."""
    try:
        yield
    except RuntimeError as error:  # whatever the backend: that is all they have in common
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise RuntimeError(f"group: a process is gone ({first}); {_CONTINUE}") from error


def _weight(plan: Plan, group: Group) -> float:
    """Products of a group for each pair of samples."""
    by_name = {entry.name: entry for entry in plan.entries}
    factored = [by_name[name].factors for name in group.factored]
    products = [costs.contracted(f, (1, 1), False, plan.form, plan.classes).flops for f in factored if f is not None]
    width = group.width + sum(by_name[name].numel for name in group.streamed)
    return 2.0 * width * plan.blocks + sum(products)
