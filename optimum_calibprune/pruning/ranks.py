# SPDX-License-Identifier: Apache-2.0
"""The processes that prune one model together, each with its part of the samples and of every solve; or one process alone."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor


T = TypeVar("T")
GRACE = 2.0  # seconds
PATIENCE = timedelta(days=1)  # how long a rank waits for another, which may be measuring the model meanwhile


class RankLost(RuntimeError):
    """This rank ends because another one has; where that one has `told` why, nothing is left to say."""

    told = False


@dataclass(frozen=True)
class Ranks:
    """This process's number among `size` processes of `torch.distributed`, which call each method here at the same time."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> Ranks:
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else cls()

    @classmethod
    def join(cls) -> Ranks:
        """Joins the processes that torchrun or accelerate has launched, where it has launched several."""
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
            cuda = torch.cuda.is_available()
            if cuda:
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
            backend = (
                "cpu:gloo,cuda:nccl" if cuda else "gloo"
            )  # what is no tensor of a GPU goes by gloo, which sees who ends
            store, rank, size = next(dist.rendezvous("env://", timeout=PATIENCE))
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
            _STORES.append(store)
        return cls.current()

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and speaks."""
        return self.rank == 0

    def part(self, count: int) -> range:
        """Which of `count` things are this rank's: as many as another's, or one more or less, and in one run."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    @contextmanager
    def one_voice(self) -> Iterator[None]:
        """Of an error that ends several ranks only one is raised as it is; the others raise `RankLost`."""
        call = next(_CALLS)
        try:
            yield
        except Exception as error:
            if self.size == 1:
                raise
            if isinstance(error, RankLost):
                time.sleep(GRACE)  # for the rank that knows why
            if self._speaks(call):
                raise
            quiet = error if isinstance(error, RankLost) else RankLost("another rank met the same error")
            quiet.told = True
            raise quiet from error

    def _speaks(self, call: int) -> bool:
        """Whether no other rank has spoken before in this call; without a store, which is the launcher's, the first one
        does."""
        if not _STORES:
            return self.first
        try:
            return _STORES[0].add(f"calibprune/spoken/{call}", 1) == 1
        except RuntimeError:  # the store has ended, too
            return self.first

    def wait(self) -> None:
        """For all ranks to come here."""
        if self.size > 1:
            with _lost():
                dist.barrier()

    def once(self, compute: Callable[[], T]) -> T:
        """What `compute` gives on the first rank, on all of them."""
        if self.size == 1:
            return compute()
        found = [compute() if self.first else None]
        with _lost():
            dist.broadcast_object_list(found, src=0)
        return found[0]  # type: ignore[return-value]

    def everywhere(self, value: T) -> list[T]:
        """What each rank has given, in their order."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with _lost():
            dist.all_gather_object(found, value)
        return found

    def add_up(self, tensor: Tensor, to: int | None = None) -> None:
        """Replaces it by the sum over the ranks: everywhere, or on one rank (elsewhere it is of no use then); any strides."""
        if self.size == 1:
            return
        whole = tensor.contiguous()  # what is no run of memory would be added up wrongly, without a word
        with _lost():
            dist.all_reduce(whole) if to is None else dist.reduce(whole, dst=to)
        tensor.copy_(whole)

    def agree(self, flag: Tensor) -> Tensor:
        """Whether it is true on all ranks."""
        if self.size == 1:
            return flag
        count = flag.int()
        self.add_up(count)
        return count == self.size

    def gather(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """The ranks' tensors, which have one shape, side by side."""
        if self.size == 1:
            return tensor
        own = tensor.contiguous()
        found = [torch.empty_like(own) for _ in range(self.size)]
        with _lost():
            dist.all_gather(found, own)
        return torch.cat(found, dim=dim)

    def send(self, tensor: Tensor, source: int) -> None:
        """Replaces it by that of the rank `source`; any strides."""
        if self.size == 1:
            return
        sends = self.rank == source
        whole = tensor.contiguous() if sends else torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        with _lost():
            dist.broadcast(whole, src=source)
        if not sends:
            tensor.copy_(whole)


ALONE = Ranks()
_STORES: list[dist.Store] = []  # what the ranks met in; it lives in the launcher
_CALLS = itertools.count()  # of `one_voice` in this process; each rank makes the same ones


@contextmanager
def _lost() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # a connection that was closed; torch has no class of its own for it on all backends
        raise RankLost(f"the processes have lost touch, as where one of them has ended ({error})") from error
