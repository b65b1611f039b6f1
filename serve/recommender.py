"""From encoded patients to recommendations: one bundle, one model, no Ray.

The model only runs in the blocks of serve/batching.py, so that an answer does not depend on who
else is in the run.
"""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import models
from cafemed import bundle as bundles
from cafemed.batches import Batch, input_adjacencies
from cafemed.bundle import Bundle
from cafemed.card import INTENDED_USE, LIMITS
from cafemed.codes import KINDS
from cafemed.errors import ArtifactError
from cafemed.stepping import moved
from models import blocks
from models.asked import Codes
from models.tracing import Traced
from serve.answering import Answerer, Explains
from serve.answers import ModelCard, ModelName, Recommendation, RecommendResponse
from serve.batching import Edges, Visits, batch_of, codes_of, lay, positions_of, room_for, runs_of
from serve.encoding import EncodedPatient, Encoder
from serve.example import example_request
from serve.explanation import Explainer
from serve.schema import Options, RecommendRequest
from serve.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

#: Patients of the check that bits are a patient's own.
_NUM_INVENTED = 40


class Recommender:
    """A bundle that answers requests.

    Attributes:
        bundle: as given.
        name: of the model, with its version.
        name_json: the same as JSON.
        names: of codes, where the user gave any.
        vocabulary: to search.
        stored_card: the model card of the version; None: it was never evaluated.
        explainer: tells what a probability comes from.
        edges: of the bundle's graph, which give the codes' classes.
        is_exact: a patient's bits do not depend on how much else is in a run.
        traced: a recording of the model, which does what a run needs without the interpreter; None
            where there is none.
    """

    def __init__(self, bundle: Bundle, version: int, device: str = "cpu") -> None:
        """Builds the model, moves it to a device ("cpu", "cuda") and runs its self-check there.

        Raises:
            ArtifactError: if the weights do not fit or the self-check fails.
            ConfigError: if the model or an option is unknown.
        """
        self.name = ModelName(name=bundle.model_name, version=version)
        self.name_json = self.name.model_dump_json().encode()
        self.bundle = bundle
        self._encoder = Encoder(bundle.vocabularies, bundle.preprocessing)
        self._model: Any = bundles.restore_model(bundle, models.build)
        self._device = torch.device(device)
        if self._device.type != "cpu":
            self._model.to(self._device)
            bundles.self_check(bundle, self._model)
        self._model.eval()
        fold = getattr(self._model, "fold", None)
        if fold is not None:
            fold()
        self.edges = Edges.of(input_adjacencies(bundle.graph, bundle.vocabularies))
        diagnoses, procedures, medications = (len(bundle.vocabularies[kind]) for kind in KINDS)
        self._sizes = (diagnoses, procedures, medications)
        self.traced = self._recorded()
        # Several threads divide elementwise work by its amount, and a GPU's library chooses its
        # routines by the number of blocks.
        self.is_exact = (
            self._device.type == "cpu" and torch.get_num_threads() == 1 and self._has_own_bits()
        )
        self._medications = bundle.vocabularies["medication"]
        self.names = bundle.names
        self.vocabulary = Vocabulary(bundle.vocabularies, self.names)
        self.stored_card: Mapping[str, Any] | None = None
        self._answerer = Answerer(
            self._medications,
            bundle.ddi,
            self.names.get("medication", {}),
            bundle.preprocessing.threshold,
        )
        self.explainer = Explainer(bundle, self.names)

    @classmethod
    def load(cls, folder: Path, version: int, device: str = "cpu") -> "Recommender":
        """Loads a bundle folder and answers an example request with it.

        Raises:
            ArtifactError: if it is not a whole, unedited bundle, if it cannot answer, or as the
                constructor.
            ConfigError: as the constructor.
        """
        recommender = cls(bundles.load(folder), version, device)
        try:
            recommender.require_answer()
        except Exception as err:
            raise ArtifactError(f"{folder}: cannot answer ({type(err).__name__})") from err
        return recommender

    def require_answer(self) -> None:
        """Answers the bundle's invented patient, as it would be sent; raises what fails."""
        request = RecommendRequest.model_validate(example_request(self.bundle))
        answer = RecommendResponse(
            request_id="", model=self.name, recommendations=self.recommend(request)
        )
        answer.model_dump_json()
        self.card.model_dump_json()

    @property
    def card(self) -> ModelCard:
        """What is served."""
        bundle, stored = self.bundle, self.stored_card
        diagnoses, procedures, medications = (
            len(bundle.vocabularies[kind]) for kind in ("diagnosis", "procedure", "medication")
        )
        return ModelCard(
            name=self.name.name,
            version=self.name.version,
            intended_use=INTENDED_USE,
            options=dict(bundle.model_options),
            threshold=bundle.preprocessing.threshold,
            inputs=bundle.preprocessing.inputs,
            num_diagnoses=diagnoses,
            num_procedures=procedures,
            num_medications=medications,
            code_systems=self._encoder.systems,
            laboratory_items=list(self._encoder.items),
            metrics=dict(bundle.metrics),
            fingerprint=bundle.fingerprint,
            sources=dict(bundle.sources),
            limits=list(stored["limits"] if stored else LIMITS),
            card=None if stored is None else dict(stored),
        )

    def encode(self, request: RecommendRequest) -> list[EncodedPatient]:
        """Looks up the codes of a request.

        Raises:
            RefusedError: naming the field.
        """
        return self._encoder.encode(request)

    @property
    def encoder(self) -> Encoder:
        """Looks up codes as this model's vocabularies write them."""
        return self._encoder

    def probabilities(self, patients: Sequence[EncodedPatient]) -> NDArray[np.float32]:
        """Probability of each medication at every patient's current visit, float32 (n, N_m).

        A row depends on its own patient alone, bit for bit.
        """
        positions = [positions_of(patient) for patient in patients]
        result = np.empty((len(patients), len(self._medications)), np.float32)
        for members in runs_of(positions):
            result[members] = self.run([patients[i] for i in members], positions[members[0]])
        return result

    def recommend(self, request: RecommendRequest) -> list[Recommendation]:
        """Answers a request without explanations, a recommendation a patient in its order.

        Raises:
            RefusedError: as encode.
        """
        patients = self.encode(request)
        scores = self.probabilities(patients)
        return [
            self.answer(patient, row, request.options)
            for patient, row in zip(patients, scores, strict=True)
        ]

    def answer(
        self,
        patient: EncodedPatient,
        probabilities: NDArray[np.float32],
        options: Options | None = None,
        explanation: Explains | None = None,
    ) -> Recommendation:
        """The recommendation for a patient with these probabilities, float32 (N_m,)."""
        return self._answerer.answer(patient, probabilities, options or Options(), explanation)

    def run(self, patients: Sequence[EncodedPatient], positions: int) -> NDArray[np.float32]:
        """One run of the model, float32 (len(patients), N_m).

        Args:
            patients: at least one, all of whom `batching.room_for` gives the same room, and who
                fit into it together.
            positions: of one of them.
        """
        return self.begun(patients, positions)()

    def begun(
        self, patients: Sequence[EncodedPatient], positions: int
    ) -> Callable[[], NDArray[np.float32]]:
        """Begins a run; what is given back ends it, with little use of the interpreter if `traced`.

        Args:
            patients: see `run`.
            positions: see `run`.
        """
        visits = lay(patients, self.edges, self.bundle.preprocessing.scaling)
        return self._begun(visits, None if self.is_exact else room_for(positions))

    def score(self, visits: Visits, positions: int) -> NDArray[np.float32]:
        """As `run`, of patients that are laid end to end."""
        return self._begun(visits, None if self.is_exact else room_for(positions))()

    def _begun(self, visits: Visits, room: int | None) -> Callable[[], NDArray[np.float32]]:
        codes = codes_of(visits, self._sizes, room)
        if self.traced is not None:
            scores = self.traced(codes)
        else:
            batch = self._batch_of(visits, codes)
            scores = functools.partial(self._scores, batch, self._model.prepare(batch, codes))
        number = len(visits.lengths)
        return lambda: scores().numpy()[:number]

    def _batch_of(self, visits: Visits, codes: Codes) -> Batch:
        return batch_of(visits, codes, self._sizes, self.bundle.preprocessing.scaling.num_items)

    def _scores(self, batch: Batch, prepared: Any) -> torch.Tensor:
        """Probabilities of the visits asked about, those that fill up the run among them."""
        with blocks.fixed():
            return self._finish(self._model(*moved((batch, prepared), self._device)).cpu())

    def _finish(self, logits: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(logits / self.bundle.preprocessing.temperature)

    def _recorded(self) -> Traced | None:
        """A recording of the model; None if it does not give invented patients the model's bits."""
        if self._device.type != "cpu" or not getattr(self._model, "reads_codes_alone", False):
            return None
        scaling = self.bundle.preprocessing.scaling
        patients = _invented(self._sizes, scaling.num_items)
        try:
            recorded: Traced | None = None
            # Many and few; the first has one visit, the second two, the last five.
            for some in (patients, patients[:1], patients[:2], patients[-1:], patients[-9:]):
                laid = lay(some, self.edges, scaling)
                codes = codes_of(laid, self._sizes)
                batch = self._batch_of(laid, codes)
                prepared = self._model.prepare(batch, codes)
                recorded = recorded or Traced(self._model, batch, codes, self._finish)
                if not torch.equal(recorded(codes)(), self._scores(batch, prepared)):
                    raise ArtifactError("other bits")
        except Exception as err:  # noqa: BLE001 - whatever a build of torch makes of it
            logger.warning("the model is not recorded, answers take longer: %s", type(err).__name__)
            return None
        return recorded

    def _has_own_bits(self) -> bool:
        """Whether invented patients get the same bits alone and together, in either order."""
        scaling = self.bundle.preprocessing.scaling
        patients = _invented(self._sizes, scaling.num_items)

        def scores(chosen: Sequence[EncodedPatient]) -> NDArray[np.float32]:
            return self._begun(lay(chosen, self.edges, scaling), None)()

        together = scores(patients)
        alone = [scores([patient])[0] for patient in patients]
        turned = scores(patients[::-1])[::-1]
        return np.array_equal(together, np.stack(alone)) and np.array_equal(together, turned)


def _invented(sizes: tuple[int, int, int], num_items: int) -> list[EncodedPatient]:
    """Patients of one to five visits with drawn codes and values, more of them than a block."""
    random = np.random.default_rng(0)

    def draw(size: int, most: int) -> tuple[int, ...]:
        return tuple(random.permutation(size)[: random.integers(0, most)].tolist())

    patients = []
    for i in range(_NUM_INVENTED):
        visits = range(1 + i % 5)
        diagnoses, procedures = (tuple(draw(sizes[k], 20) for _ in visits) for k in range(2))
        patients.append(
            EncodedPatient(
                known=(
                    diagnoses,
                    procedures,
                    tuple(draw(sizes[2], 20 * (t > 0) + 1) for t in visits),
                ),
                taken=(),
                sex=i % 3,
                age=20.0 + i,
                laboratory=tuple(
                    tuple((item, float(random.normal())) for item in draw(num_items, 20))
                    for _ in visits
                ),
                unknown=(),
            )
        )
    return patients
