"""Many requests or servers at a time, of which none keeps a process from ending."""

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import psutil

from devtools.launch import end_process_trees

Job = TypeVar("Job")
Key = TypeVar("Key")
Entered = TypeVar("Entered")


def ask_side_by_side(ask: Callable[[Job], Any], jobs: Sequence[Job], concurrency: int) -> Iterator[tuple[Job, Any]]:
    """Yield every job with what ``ask`` returned for it, as they are done; ``concurrency`` are under way at a time.

    Whoever stops iterating, also by an error or a signal, starts no further ones and waits for none: threads of a pool
    of Python's would be waited for when the process ends, and an answer may take hours.

    Raises:
        Exception: The first that ``ask`` raised.
    """
    todo: queue.SimpleQueue[Job] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[Job, Any, BaseException | None]] = queue.SimpleQueue()
    is_over = threading.Event()
    for job in jobs:
        todo.put(job)

    def work() -> None:
        while not is_over.is_set():
            try:
                job = todo.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((job, ask(job), None))
            except BaseException as error:
                done.put((job, None, error))

    for _ in range(min(concurrency, len(jobs))):
        threading.Thread(target=work, daemon=True).start()
    try:
        for _ in jobs:
            job, answer, error = done.get()
            if error is not None:
                raise error
            yield job, answer
    finally:
        is_over.set()


@contextlib.contextmanager
def ended_with_its_processes(pool: ThreadPoolExecutor) -> Iterator[None]:
    """Let an error or an interrupt end the processes that were started, for which the pool would wait."""
    try:
        yield
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        waiting = threading.Thread(target=pool.shutdown)
        waiting.start()
        end_process_trees(*psutil.Process().children())
        while waiting.is_alive():
            # Again, because a thread may just have been about to start one.
            waiting.join(0.2)
            end_process_trees(*psutil.Process().children())
        raise


@contextlib.contextmanager
def entered_side_by_side(contexts: Mapping[Key, AbstractContextManager[Entered]]) -> Iterator[dict[Key, Entered]]:
    """Enter contexts at the same time, and leave them so too: of servers, which take a while to start and to end.

    Raises:
        Exception: What the first of them raised that could not be entered.
    """
    with ThreadPoolExecutor(len(contexts)) as starters, ThreadPoolExecutor(len(contexts)) as enders:
        entering: dict[Key, Future[Entered]] = {}
        try:
            with ended_with_its_processes(starters):
                for key, context in contexts.items():
                    entering[key] = starters.submit(context.__enter__)
                wait(entering.values())
                yield {key: entered.result() for key, entered in entering.items()}
        finally:
            # One that could not be entered has been left by itself.
            whole = [contexts[key] for key, entered in entering.items() if entered.exception() is None]
            list(enders.map(lambda context: context.__exit__(None, None, None), whole))
