"""A generation that runs by itself and is read from any thread, or from a task of asyncio."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from queue import Empty
from types import TracebackType
from typing import Self

from .scheduler import End, Request, Result, Scheduler


class Stream:
    """Results of a generation, as an iterator and as an asynchronous one, for one reader. See `Engine.stream`.

    Nothing is lost if they are read late. Leaving early: `cancel`, or as a context manager (`with`, `async with`).
    """

    def __init__(self, scheduler: Scheduler, request: Request) -> None:
        """Submits the request. Raises InputError if the engine has been closed."""
        self._scheduler, self._request = scheduler, request
        self._loop: asyncio.AbstractEventLoop | None = None
        self._news = asyncio.Event()
        self._over = False
        request.tell = self._tell
        scheduler.submit(request)

    def cancel(self) -> None:
        """End the generation, which takes the present token at most; what is there already can still be read. Safe to call twice."""
        self._scheduler.cancel(self._request)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Result:
        """The next result, once it is there. Raises what ended the generation if that was an error."""
        if self._over:
            raise StopIteration
        result = self._taken(self._request.results.get())
        if result is None:
            raise StopIteration
        return result

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Result:
        """As `__next__`. If the task is cancelled, so is the generation."""
        self._loop = asyncio.get_running_loop()
        while not self._over:
            self._news.clear()
            try:
                result = self._taken(self._request.results.get_nowait())
            except Empty:
                try:
                    await self._news.wait()
                except asyncio.CancelledError:
                    await asyncio.shield(asyncio.to_thread(self.cancel))
                    raise
                continue
            if result is not None:
                return result
        raise StopAsyncIteration

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await asyncio.to_thread(self.cancel)

    def _taken(self, result: Result | End) -> Result | None:
        """What to hand on: None at the end. Raises an error that ended it."""
        if isinstance(result, Result):
            self._over = result.finish is not None
            return result
        self._over = True
        if result.error:
            raise result.error
        return None

    def _tell(self, result: Result | End) -> None:
        """In the scheduler's thread."""
        self._request.results.put(result)
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop has been closed
                self._loop.call_soon_threadsafe(self._news.set)
