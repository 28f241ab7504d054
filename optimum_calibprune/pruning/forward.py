# SPDX-License-Identifier: Apache-2.0
"""A forward that can wait: it stops before chosen modules, and goes on when it is told to.

Each `switch()` runs it to the next gate, where it hands over what is about to be read there, and at last returns
its result; `drop()` ends it earlier. So many micro-batches can wait at the same gate until its modules are solved, and then
go on with the pruned weights: one forward in all, with the arithmetic of micro-batches.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


try:
    from greenlet import getcurrent, greenlet
except ImportError:  # on a machine with nothing but torch and transformers
    greenlet = None


class ThreadForward(threading.Thread):
    """A forward on a thread of its own; only one of them and their caller runs at a time.

    For where greenlet is not installed: on a CPU each thread brings its own OpenMP workers.
    """

    gate: nn.Module | None = None
    dead = False

    def __init__(self, function: Callable[[], Tensor]) -> None:
        super().__init__(daemon=True)
        self._function = function
        self._device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._brought: Any = None
        self._dropped = False

    def switch(self) -> Any:
        if self.ident is None:
            self.start()
        self._go.release()
        self._back.acquire()
        brought, self._brought = self._brought, None
        if isinstance(brought, BaseException):
            raise brought
        assert brought is not None
        return brought

    def drop(self) -> None:
        self._dropped = True
        if self.ident is not None and not self.dead:
            self._go.release()
            self.join()
        self.dead = True

    def hand_over(self, x: Any) -> None:
        self._brought = x
        self._back.release()
        self._go.acquire()
        if self._dropped:
            raise _Dropped

    @torch.no_grad()
    def run(self) -> None:
        self._go.acquire()
        if self._device is not None:
            torch.cuda.set_device(self._device)
        try:
            self._brought = self._function()
        except _Dropped:
            self._brought = None
        except BaseException as error:
            self._brought = error
        self.dead = True
        del self._function
        self._back.release()


class _Dropped(BaseException):
    pass


if greenlet is None:
    Forward = ThreadForward
else:

    class Forward(greenlet):
        """A forward as a greenlet: all of them on the caller's thread."""

        gate: nn.Module | None = None

        def drop(self) -> None:
            if not self.dead:
                self.throw()

        def hand_over(self, x: Any) -> None:
            self.parent.switch(x)


def _current() -> object:
    thread = threading.current_thread()
    return thread if greenlet is None or isinstance(thread, ThreadForward) else getcurrent()


def wait_before(
    module: nn.Module, read: Callable[[tuple[Any, ...], dict[str, Any]], Any]
) -> torch.utils.hooks.RemovableHandle:
    """Makes every forward of this kind wait before `module`, where it hands over `read(args, kwargs)`; others pass."""

    def gate(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        current = _current()
        if isinstance(current, ThreadForward | Forward):
            current.gate = module
            current.hand_over(read(args, kwargs))

    return module.register_forward_pre_hook(gate, with_kwargs=True)
