"""Back-pressure of a replica: how many requests it works on at once, and what the others are told.

Ray Serve has a limit of its own, behind which requests wait; what it then answers does not know
when to come back. So this limit is reached first: a request over it is refused at once, with a
`Retry-After` from the time that requests have been taking. A long request takes the places of
several, which bounds what a replica holds and how long others wait behind it.
"""

import math
import time
from collections.abc import Callable

from serve import limits
from serve.asgi import Application, Message, Receive, Send

#: Bounds of what is told, in seconds: less is not a whole second, more keeps clients away from
#: replicas that are added meanwhile.
MIN_RETRY_S, MAX_RETRY_S = 1, 30
#: Bytes of a body for each place that it takes: a few patients, or some two thousand codes.
BYTES_OF_A_PLACE = 64 * 1024
#: Weight of a new request in the running mean of their times: the last twenty or so count.
_WEIGHT = 0.05


class Admission:
    """Counts the requests in progress; used from one event loop.

    Attributes:
        limit: places, each for one request of usual length.
        in_progress: requests now.
        refused: so far.
    """

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit = limit
        self.in_progress = 0
        self.refused = 0
        self._taken = 0
        self._clock = clock
        self._mean_s = 0.0

    def enter(self, places: int = 1) -> float | None:
        """Admits a request: gives its start, for `leave`; None if it is refused.

        One that takes more places than there are is admitted where it is alone.
        """
        if self.in_progress and self._taken + places > self.limit:
            self.refused += 1
            return None
        self.in_progress += 1
        self._taken += places
        return self._clock()

    def leave(self, started: float, places: int = 1) -> None:
        """Ends a request that was admitted."""
        self.in_progress -= 1
        self._taken -= places
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
        places = max(1, math.ceil(scope.get(limits.SIZE, 0) / BYTES_OF_A_PLACE))
        started = self._admission.enter(places)
        if started is None:
            await self._refuse(scope, self._admission.retry_after_s)(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        finally:
            self._admission.leave(started, places)
