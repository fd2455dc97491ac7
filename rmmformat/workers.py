"""Where targets are worked on: here, on several processes, or on a cluster.

A conversion maps pure functions over targets through a :class:`concurrent.futures.Executor`.
Factors are read here and travel with the work, so workers need this package and neither the sources
nor a common file system; a worker that is lost takes nothing with it.  Results are put in the order
of the targets, so the file does not depend on who computed what, nor on how many there are.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    CancelledError,
    Executor,
    Future,
    ProcessPoolExecutor,
    wait,
)
from typing import Any, TypeVar

from rmmformat._version import __version__
from rmmformat.errors import OptionError, RemoteError, RmmError, UnsupportedError

__all__ = ["ClusterExecutor", "finished", "worker_errors", "worker_pool"]

T = TypeVar("T")

#: Seconds to wait for a scheduler, and for its first worker.
_PATIENCE = 30.0
#: Seconds between looks at whether anybody is still working.
_LOOK = 2.0


@contextlib.contextmanager
def worker_pool(
    count: int = 1, scheduler: str | None = None, *, patience: float = _PATIENCE
) -> Iterator[Executor | None]:
    """Lend an executor; None for one worker, which is this process.

    What waits is cancelled at the end.

    Parameters
    ----------
    count
        Processes on this machine.
    scheduler
        Address of a Dask scheduler (``tcp://host:8786``), whose workers to use instead.
    patience
        Seconds to wait for the scheduler, and for its first worker.

    Raises
    ------
    OptionError
        Both are given.
    UnsupportedError
        Dask is not installed.
    RemoteError
        The scheduler does not answer, has no workers, or they have another version of this package.
    """
    if scheduler is not None:
        if count != 1:
            raise OptionError("either --workers or --scheduler, not both")
        with _cluster(scheduler, patience) as cluster:
            yield cluster
        return
    if count == 1:
        yield None
        return
    executor = ProcessPoolExecutor(count)
    try:
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _cluster(address: str, patience: float) -> Iterator[Executor]:
    try:
        import dask
        import distributed
    except ImportError as error:
        raise UnsupportedError(
            "a scheduler needs Dask", hint='pip install "rmmformat[distributed]"'
        ) from error
    connect: Any = distributed.Client  # has no types
    try:
        client = connect(address, timeout=patience, set_as_default=False)
    except (OSError, ValueError, TimeoutError) as error:
        raise RemoteError(f"no Dask scheduler answers: {error}"[:300], path=address) from error
    # The factors of one target of a large collection are what Dask calls large.
    quiet = dask.config.set({"distributed.admin.large-graph-warning-threshold": "1 TB"})
    with client, quiet:
        try:
            client.wait_for_workers(1, timeout=patience)
        except (TimeoutError, distributed.TimeoutError) as error:
            raise RemoteError(
                "the scheduler has no workers", path=address, hint="Start one: dask worker ADDRESS."
            ) from error
        _check_versions(client, address)
        executor = ClusterExecutor(client, address, patience)
        try:
            yield executor
        finally:
            executor.shutdown(wait=False, cancel_futures=True)


def _check_versions(client: Any, address: str) -> None:
    found = client.run(_version, on_error="return")
    for worker, version in sorted(found.items()):
        if version != __version__:
            said = version if isinstance(version, str) else f"{type(version).__name__}: {version}"
            raise RemoteError(
                f"worker {worker} has rmmformat {said}"[:300],
                path=address,
                hint=f"Install version {__version__} there, too.",
            )


def _version() -> str:
    return __version__


class ClusterExecutor(Executor):
    """A Dask cluster as an executor.

    Work is sent through the scheduler with its factors, so that it can be given to another worker
    when one is lost.
    """

    def __init__(self, client: Any, address: str, patience: float = _PATIENCE) -> None:
        self._client, self._address, self._patience = client, address, patience
        self._alone_since: float | None = None
        # Equal calls are made but once where Dask takes them for pure; finding that out costs a
        # digest of all factors, and no two targets are equal.
        self._inner = client.get_executor(pure=False)

    @property
    def _max_workers(self) -> int:
        """Threads of all workers as of now, for whoever keeps them busy."""
        n_threads: int = sum(self._client.nthreads().values())
        return max(1, n_threads)

    def check(self) -> None:
        """Say so if nobody works any more; whoever waits for results asks now and then.

        Raises
        ------
        RemoteError
            The scheduler is gone, or has had no workers for the time that one waits for the first.
        """
        if self._client.status != "running":
            raise RemoteError("the connection to the scheduler was lost", path=self._address)
        now = time.monotonic()
        if self._client.nthreads():
            self._alone_since = None
        elif self._alone_since is None:
            self._alone_since = now
        elif now - self._alone_since > self._patience:
            raise RemoteError(
                "the scheduler has no workers left",
                path=self._address,
                hint="Most often memory ran out on them.",
            )

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Send a call to the cluster."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*large graph", category=UserWarning)
            future: Future[T] = self._inner.submit(fn, *args, **kwargs)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls; cancel those that have not run."""
        self._inner.shutdown(wait=wait and not cancel_futures)


def finished(executor: Executor, running: Collection[Future[T]]) -> set[Future[T]]:
    """Wait until some of the calls under way are done, and give those.

    Raises
    ------
    RemoteError
        Nobody is left to do them.
    """
    while True:
        done = wait(running, timeout=_LOOK, return_when=FIRST_COMPLETED).done
        if done:
            return done
        if isinstance(executor, ClusterExecutor):
            executor.check()


@contextlib.contextmanager
def worker_errors() -> Iterator[None]:
    """Turn the loss of workers within the block into one clear error.

    Raises
    ------
    RmmError
        A process died, or the cluster gave up.
    """
    try:
        yield
    except BrokenExecutor as error:
        raise RmmError(
            "a worker process died",
            hint="Most often memory ran out: use fewer --workers.",
        ) from error
    except CancelledError as error:
        raise RmmError("the connection to the scheduler was lost") from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "distributed":
            raise
        raise RmmError(
            f"the cluster gave up: {str(error) or type(error).__name__}"[:400],
            hint="Most often memory ran out on its workers.",
        ) from error
