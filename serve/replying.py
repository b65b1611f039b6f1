"""A request from its codes to the bytes of its answer, off the event loop where it takes long."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from serve.answers import Recommendation
from serve.asking import Asked
from serve.encoding import EncodedPatient, UnknownCodesError
from serve.explanation import Plan
from serve.observing import Observer
from serve.recommender import Recommender

#: Patients whose codes are looked up and who are answered in the event loop: 0.1 ms each
#: (measured), no more than a thread takes to start.
_FEW = 4
#: Of whom a code takes less than a microsecond: so many may have few patients.
_FEW_CODES = 2048

T = TypeVar("T")


class Service(Protocol):
    """What the routes need."""

    @property
    def recommender(self) -> Recommender:
        """The recommender in use; another one after a promotion."""

    async def probabilities(
        self, recommender: Recommender, patients: Sequence[EncodedPatient]
    ) -> list[NDArray[np.float32]]:
        """Runs the model, batched with other requests; one row (N_m,) a patient."""


async def encoded(
    recommender: Recommender, asked: Asked, max_unknown_share: float
) -> list[EncodedPatient]:
    """Looks up the codes of a request.

    Raises:
        RefusedError: naming the field; also for a patient with a larger share of unknown codes.
    """
    many = len(asked.patients) > _FEW or asked.num_codes > _FEW_CODES
    patients = await _run(many, lambda: recommender.encoder.encode_all(asked.patients))
    for place, patient in enumerate(patients):
        if patient.unknown_share > max_unknown_share:
            raise UnknownCodesError(place, patient.unknown_share, max_unknown_share)
    return patients


async def replied(
    service: Service,
    recommender: Recommender,
    asked: Asked,
    patients: Sequence[EncodedPatient],
    request_id: str,
    observer: Observer | None = None,
) -> bytes:
    """Answers a request; JSON of a RecommendResponse.

    Args:
        service: runs the model.
        recommender: of the service, the one that has encoded the patients.
        asked: the request.
        patients: its patients.
        request_id: as in the answer: letters, digits, - and _.
        observer: is told what is recommended.
    """
    explainer, options = recommender.explainer, asked.options
    plans: list[Plan] = []
    if options.explain:
        plans = await asyncio.to_thread(lambda: [explainer.plan(p) for p in patients])
    everyone = [*patients, *(one for plan in plans for one in plan.reduced)]
    scores = await service.probabilities(recommender, everyone)
    rows = scores[: len(patients)]

    def answer() -> tuple[list[Recommendation], bytes]:
        explanations = explainer.explanations(plans, scores) if plans else [None] * len(patients)
        answers = [
            recommender.answer(patient, row, options, explanation)
            for patient, row, explanation in zip(patients, rows, explanations, strict=True)
        ]
        # They were made here, of values of the right types: there is nothing to validate.
        return answers, b'{"request_id":"%b","model":%b,"recommendations":%b}' % (
            request_id.encode(),
            recommender.name_json,
            msgspec.json.encode(answers),
        )

    long = len(patients) > _FEW or options.explain or options.max_ddi_rate is not None
    answers, content = await _run(long, answer)
    if observer is not None:
        observer.recommended(asked, recommender, patients, rows, answers)
    return content


async def _run(long: bool, work: Callable[[], T]) -> T:
    """Runs in a thread what takes long, so that the event loop goes on."""
    return await asyncio.to_thread(work) if long else work()
