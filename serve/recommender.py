"""From encoded patients to recommendations: one bundle, one model, no Ray.

The model only runs at the fixed shapes of serve/batching.py, so that an answer does not depend on
who else is in the batch.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
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
from cafemed.errors import ArtifactError
from serve.answering import Answerer, Explains
from serve.answers import ModelCard, ModelName, Recommendation, RecommendResponse
from serve.batching import Edges, Shape, batch_of, kinds_of, shape_of
from serve.encoding import EncodedPatient, Encoder
from serve.example import example_request
from serve.explanation import Explainer
from serve.schema import Options, RecommendRequest
from serve.vocabulary import Vocabulary


class Recommender:
    """A bundle that answers requests.

    Attributes:
        bundle: as given.
        name: of the model, with its version.
        names: of codes, where the user gave any.
        vocabulary: to search.
        stored_card: the model card of the version; None: it was never evaluated.
        explainer: tells what a probability comes from.
    """

    def __init__(self, bundle: Bundle, version: int, device: str = "cpu") -> None:
        """Builds the model, moves it to a device ("cpu", "cuda") and runs its self-check there.

        Raises:
            ArtifactError: if the weights do not fit or the self-check fails.
            ConfigError: if the model or an option is unknown.
        """
        self.name = ModelName(name=bundle.model_name, version=version)
        self.bundle = bundle
        self._encoder = Encoder(bundle.vocabularies, bundle.preprocessing)
        self._model = bundles.restore_model(bundle, models.build)
        self._device = torch.device(device)
        if self._device.type != "cpu":
            self._model.to(self._device)
            bundles.self_check(bundle, self._model)
        adjacencies = input_adjacencies(bundle.graph, bundle.vocabularies)
        self._edges = [Edges.of(adjacency) for adjacency in adjacencies]
        self._kinds = kinds_of(bundle.vocabularies)
        # Whether runs of a shape with so much room give the bits of whole ones.
        self._exact: dict[tuple[Shape, int], bool] = {}
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
        result = np.empty((len(patients), len(self._medications)), np.float32)
        by_shape: dict[Shape, list[int]] = defaultdict(list)
        for i, patient in enumerate(patients):
            by_shape[self.shape(patient)].append(i)
        for shape, members in by_shape.items():
            for start in range(0, len(members), shape.patients):
                run = members[start : start + shape.patients]
                result[run] = self.run([patients[i] for i in run], shape)
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

    def shape(self, patient: EncodedPatient) -> Shape:
        """The shape that a patient is run at."""
        return shape_of(patient, self._kinds)

    def run(self, patients: Sequence[EncodedPatient], shape: Shape) -> NDArray[np.float32]:
        """One run of the model at a fixed shape, float32 (len(patients), N_m).

        Few patients are run with less room, which costs less. What a smaller run gives is used at
        a shape only after one has given, for the same patients, the bits of a whole one.

        Args:
            patients: 1 to shape.patients, all of this shape.
            shape: see `shape`.
        """
        room = shape.room(len(patients))
        if room == shape.patients or not self._exact.get((shape, room), True):
            return self._run(patients, shape, shape.patients)
        rows = self._run(patients, shape, room)
        if (shape, room) in self._exact:
            return rows
        whole = self._run(patients, shape, shape.patients)
        self._exact[shape, room] = np.array_equal(rows, whole)
        return whole

    def _run(
        self, patients: Sequence[EncodedPatient], shape: Shape, room: int
    ) -> NDArray[np.float32]:
        bundle = self.bundle
        batch = batch_of(
            patients,
            shape,
            bundle.vocabularies,
            bundle.preprocessing.scaling,
            self._edges,
            room,
        )
        return self.score(batch, torch.tensor([patient.num_visits - 1 for patient in patients]))

    def score(self, batch: Batch, last: torch.Tensor) -> NDArray[np.float32]:
        """One run of the model on tensors of a fixed shape, float32 (n, N_m).

        Args:
            batch: on the CPU; its first n patients are asked about.
            last: int64 (n,), the step of each one's current visit.
        """
        with torch.inference_mode():
            if self._device.type != "cpu":
                batch = batch.to(self._device)
            logits = self._model(batch).cpu()
            logits = logits[torch.arange(len(last)), last]
            logits = logits / self.bundle.preprocessing.temperature
            # Row by row: the last few elements of a tensor, which fill no vector register, are
            # computed by another exp.
            scores = torch.stack([torch.sigmoid(row) for row in logits.unbind()])
        return np.asarray(scores.numpy(), np.float32)
