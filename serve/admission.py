"""Back-pressure of a replica: how many requests it works on at once, and what the others are told.

Ray Serve has a limit of its own, behind which requests wait; what it then answers does not know
when to come back. So this limit is reached first: a request over it is refused at once, with a
`Retry-After` from the time that requests have been taking.
"""

import math
import time
from collections.abc import Callable

from serve.asgi import Application, Message, Receive, Send

#: Bounds of what is told, in seconds: less is not a whole second, more keeps clients away from
#: replicas that are added meanwhile.
MIN_RETRY_S, MAX_RETRY_S = 1, 30
#: Weight of a new request in the running mean of their times: the last twenty or so count.
_WEIGHT = 0.05


class Admission:
    """Counts the requests in progress; used from one event loop.

    Attributes:
        limit: requests worked on at once.
        in_progress: now.
        refused: so far.
    """

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit = limit
        self.in_progress = 0
        self.refused = 0
        self._clock = clock
        self._mean_s = 0.0

    def enter(self) -> float | None:
        """Admits a request: gives its start, for `leave`; None if it is refused."""
        if self.in_progress >= self.limit:
            self.refused += 1
            return None
        self.in_progress += 1
        return self._clock()

    def leave(self, started: float) -> None:
        """Ends a request that was admitted."""
        self.in_progress -= 1
        took = self._clock() - started
        self._mean_s += (_WEIGHT if self._mean_s else 1.0) * (took - self._mean_s)

    @property
    def retry_after_s(self) -> int:
        """When a refused client should ask again.

        By Little's law those in progress are done after the mean time of a request, which was
        measured with as many others in progress.
        """
        return min(max(math.ceil(self._mean_s), MIN_RETRY_S), MAX_RETRY_S)


class Admitted:
    """ASGI middleware: lets POST requests through as far as the admission goes.

    All others are cheap, and tell whether a replica lives: they are never refused.
    """

    def __init__(
        self, app: Application, admission: Admission, refuse: Callable[[Message, int], Application]
    ) -> None:
        """Wraps an application.

        Args:
            app: to wrap.
            admission: the replica's.
            refuse: gives the answer to a request's scope, for the seconds to wait.
        """
        self._app = app
        self._admission = admission
        self._refuse = refuse

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        started = self._admission.enter()
        if started is None:
            await self._refuse(scope, self._admission.retry_after_s)(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        finally:
            self._admission.leave(started)
