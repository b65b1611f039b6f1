"""Back-pressure of a replica: how many requests it works on at once, and what the others are told.

Ray Serve has a limit of its own, behind which requests wait; what it then answers does not know
when to come back. So this limit is reached first: a request over it is refused at once, with a
`Retry-After` from the time that requests have been taking. A long request takes the places of
several, which bounds what a replica holds and how long others wait behind it; so does one whose
options make much work of few bytes, from the moment that it is read.
"""

import dataclasses
import math
import time
from collections.abc import Callable

from serve import limits
from serve.asgi import Application, Message, Receive, Send
from serve.asking import Asked, AskedPatient
from serve.explanation import MAX_EXPLAINED_CODES, MAX_EXPLAINED_POSITIONS

#: Bounds of what is told, in seconds: less is not a whole second, more keeps clients away from
#: replicas that are added meanwhile.
MIN_RETRY_S, MAX_RETRY_S = 1, 30
#: Bytes of a body for each place that it takes: a few patients, or some two thousand codes.
BYTES_OF_A_PLACE = 64 * 1024
#: Codes for each place of a request with explanations: as many as its bytes may hold, and each
#: patient's count again for each one that is left out. 7 to 44 ms of a core (measured).
EXPLAINED_CODES_OF_A_PLACE = 2048
#: Patients for each place of a request with `max_ddi_rate`: some milliseconds of a core mostly, and
#: never more than 0.2 s. 256 take as many places as the longest body.
SELECTED_PATIENTS_OF_A_PLACE = 4
#: Weight of a new request in the running mean of their times: the last twenty or so count.
_WEIGHT = 0.05
#: Where the places that a request has taken are told to what is further in.
_STAY = "cafemed.stay"


@dataclasses.dataclass(slots=True)
class Stay:
    """A request in progress.

    Attributes:
        started: by the admission's clock.
        places: that it takes.
    """

    started: float
    places: int


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

    def enter(self, places: int = 1) -> Stay | None:
        """Admits a request; None if it is refused.

        One that takes more places than there are is admitted where it is alone.
        """
        if self.in_progress and self._taken + places > self.limit:
            self.refused += 1
            return None
        self.in_progress += 1
        self._taken += places
        return Stay(self._clock(), places)

    def extend(self, stay: Stay, places: int) -> bool:
        """Has an admitted request take at least so many places; False if it is refused.

        Either way it is still to leave. As in `enter`, one that is alone is not refused.
        """
        more = places - stay.places
        if more <= 0:
            return True
        if self.in_progress > 1 and self._taken + more > self.limit:
            self.refused += 1
            return False
        stay.places = places
        self._taken += more
        return True

    def leave(self, stay: Stay) -> None:
        """Ends a request that was admitted."""
        self.in_progress -= 1
        self._taken -= stay.places
        took = self._clock() - stay.started
        self._mean_s += (_WEIGHT if self._mean_s else 1.0) * (took - self._mean_s)

    @property
    def retry_after_s(self) -> int:
        """When a refused client should ask again.

        By Little's law those in progress are done after the mean time of a request, which was
        measured with as many others in progress.
        """
        return min(max(math.ceil(self._mean_s), MIN_RETRY_S), MAX_RETRY_S)


def has_room(admission: Admission, scope: Message, asked: Asked) -> bool:
    """Has a request that `Admitted` let through take the places that its options need, if it can.

    Args:
        admission: the replica's.
        scope: the request's.
        asked: by it.
    """
    options = asked.options
    if not options.explain and options.max_ddi_rate is None:
        return True
    stay: Stay = scope[_STAY]
    return admission.extend(stay, places_of(asked))


def places_of(asked: Asked) -> int:
    """Places that the options of a request need, 0 without any that make much work."""
    places = 0
    if asked.options.explain:
        computed = sum(map(_computed_codes, asked.patients))
        places += math.ceil(computed / EXPLAINED_CODES_OF_A_PLACE)
    if asked.options.max_ddi_rate is not None:
        places += math.ceil(len(asked.patients) / SELECTED_PATIENTS_OF_A_PLACE)
    return places


def _computed_codes(patient: AskedPatient) -> int:
    """About as many codes as the model is given to explain a patient; see serve/explanation.py."""
    number = sum(
        len(listed)
        for visit in patient.visits
        for listed in (visit.diagnoses, visit.procedures, visit.medications, visit.laboratory)
        if listed
    )
    return min(min(number, MAX_EXPLAINED_CODES) * number, MAX_EXPLAINED_POSITIONS)


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
        stay = self._admission.enter(places)
        if stay is None:
            await self._refuse(scope, self._admission.retry_after_s)(scope, receive, send)
            return
        scope[_STAY] = stay
        try:
            await self._app(scope, receive, send)
        finally:
            self._admission.leave(stay)
