"""A Gram matrix shared by processes: each takes some groups of parameters, and one sum over all of them makes H.

Every process sees all samples; the gradients it holds and the products it makes are its share. A process that fails
tells the others before it raises, and one that is gone is noticed by the next exchange, so nobody waits for ever.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from sdfast.ntk import costs
from sdfast.ntk.blocks import Group
from sdfast.ntk.memory_format import FormatRefusedError
from sdfast.ntk.plan import Plan
from sdfast.ntk.sample_rows import PathChangedError

_DONE, _PATH_CHANGED, _FORMAT_REFUSED, _FAILED = range(4)  # the worst of all processes' decides
_AGAIN = {_PATH_CHANGED: PathChangedError, _FORMAT_REFUSED: FormatRefusedError}  # all processes begin anew
_LONGEST = 500  # characters of a message
_CONTINUE = "started again with the same checkpoint=, all processes continue with the groups that are missing"


class Shards:
    """The processes of a group, and this one's place among them.

    Args:
        group: A ``torch.distributed`` process group, or ``None``: this process alone.
        continues: Whether a run that is started again goes on where this one ends.

    Raises:
        TypeError: `group` is no process group.
        ValueError: This process is not in it.
        RuntimeError: torch.distributed is not initialised.
    """

    def __init__(self, group: Any, continues: bool = False) -> None:
        self.group, self.device, self.rank, self.world = group, torch.device("cpu"), 0, 1
        self.advice = f"; {_CONTINUE}" if continues else ""
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

    def serve(self, device: torch.device) -> None:
        """Exchanges matrices from the device of the model.

        Raises:
            ValueError: The backend of the group does not.
        """
        self.device = device
        backend = "" if self.group is None else torch.distributed.get_backend(self.group)
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
    def together(self, resumable: bool = True) -> Iterator[None]:
        """Work of each process without an exchange, after which all know whether all got through it.

        Args:
            resumable: Whether a run that is started again spares a part of this work.

        Yields:
            Nothing.

        Raises:
            PathChangedError: Somewhere a micro-batch took another path; raised in every process.
            FormatRefusedError: Somewhere the model failed in a memory format; raised in every process.
            RuntimeError: Another process failed.
        """
        try:
            yield
        except tuple(_AGAIN.values()) as error:
            state = next(state for state, kind in _AGAIN.items() if isinstance(error, kind))
            self._agree(state, str(error), resumable)
            raise
        except BaseException as error:
            with suppress(RuntimeError):  # that others failed too: this one says why it did
                self._agree(_FAILED, _told(error), resumable)
            raise
        self._agree(_DONE, "", resumable)

    def add_up(self, total: Tensor) -> None:
        """The sum over all processes, in place, in every one: the one exchange of matrices."""
        if self.world == 1:
            return
        whole = total if total.is_contiguous() and total.device == self.device else total.to(self.device).contiguous()
        with self._gone():
            torch.distributed.all_reduce(whole, group=self.group)
        if whole is not total:
            total.copy_(whole)

    def _agree(self, state: int, reason: str, resumable: bool) -> None:
        """Raises what other processes met, where that is worse than what this one did."""
        states = self._gathered((state, reason))
        worst = max(other for other, _ in states)
        reasons = {rank: told for rank, (other, told) in enumerate(states) if other == worst}
        if worst == state:
            return
        if worst == _FAILED:
            told = "; ".join(f"rank {rank} failed with {why}" for rank, why in reasons.items())
            raise RuntimeError(f"group: {told}{self.advice if resumable else ''}")
        raise _AGAIN[worst](next(iter(reasons.values())))

    def _gathered(self, value: Any) -> Sequence[Any]:
        if self.world == 1:
            return [value]
        gathered: list[Any] = [None] * self.world
        with self._gone():
            torch.distributed.all_gather_object(gathered, value, group=self.group)
        return gathered

    @contextmanager
    def _gone(self) -> Iterator[None]:
        """Says what it means that an exchange fails."""
        try:
            yield
        except RuntimeError as error:  # whatever the backend: that is all they have in common
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise RuntimeError(f"group: a process is gone ({first}){self.advice}") from error


def _told(error: BaseException) -> str:
    """Its class and the first line of its message, which may itself fail."""
    try:
        lines = str(error).splitlines()
    except Exception:
        lines = []
    return f"{type(error).__name__}: {lines[0][:_LONGEST]}" if lines else type(error).__name__


def _weight(plan: Plan, group: Group) -> float:
    """Products of a group for each pair of samples."""
    by_name = {entry.name: entry for entry in plan.entries}
    factored = [by_name[name].factors for name in group.factored]
    products = [costs.contracted(f, (1, 1), False, plan.form, plan.classes).flops for f in factored if f is not None]
    width = group.width + sum(by_name[name].numel for name in group.streamed)
    return 2.0 * width * plan.blocks + sum(products)
