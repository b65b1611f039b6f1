"""GraphDiffMed: differential attention within a visit and over visits, with drug interactions.

As in CafeMed, all visits of a batch of patients are encoded at once and what the model says of
visit t is what it says of a patient whose last visit is t: the input of visit t holds nothing
later, and attention over visits is causal.
"""

import dataclasses
from typing import Annotated, Literal

import torch
from torch import nn

from cafemed.batches import Batch, ModelInputs
from cafemed.config import Range
from cafemed.errors import ConfigError
from cafemed.stepping import moved
from models import blocks
from models.asked import Codes
from models.demographics import Demographics
from models.differential import InterVisitAttention, IntraVisitAttention, VisitPairs
from models.direct import direct_path
from models.dropout import FastDropout
from models.embeddings import embedding_table, require_sizes
from models.homogeneous import ClassMask
from models.laboratory import LaboratoryEncoder
from models.molecules import MoleculeBranch
from models.packing import Packing, pack
from models.recurrent import ParallelGRU
from models.review import CausalReview, known_codes
from models.sparse_map import Rows


@dataclasses.dataclass(frozen=True)
class GraphDiffMedOptions:
    """Options of GraphDiffMed; docs/models.md says whose each is.

    Attributes:
        dimension: d, of embeddings, attention and GRUs.
        dropout: on looked-up embeddings, in training.
        attention_dropout: on the differences of attention's contexts, in training.
        heads: H, pairs of query heads; a divisor of dimension.
        graph_bias: lambda_g, of the interaction rates added to attention between visits.
        modalities: besides codes: L laboratory events, G the sex, Y the age.
        laboratory_encoding: an item by its number, as published, or with vectors of its own.
        laboratory_scaling: of laboratory values, as training visits scale them, or within each
            visit once more.
        molecules: medications and messages from their molecules: where the cohort has them, always
            (an error where it has none), or never.
        relation_levels: classes of relevance to a molecule, each 1 / relation_levels wide; the
            lowest gives no edge.
        virtual_edges: at visits without any relevance: from all molecules, or none.
        review: whether logits are moved by the effects of the visit's codes.
        review_quantiles: of the effects of each kind of code, or of all effects.
        duplicate_state: the head sees the GRUs' outputs twice, or once.
        direct: one chance for each code and medication beside the deep path, joined to it as
            independent causes ("noisy_or") or on the log-odds ("additive"); "none": as published.
        direct_start: the direct path starts from the causal effects, or evenly.
        direct_pace: how fast the direct path learns beside all else.
    """

    dimension: Annotated[int, Range(1)] = 64
    dropout: Annotated[float, Range(0, 1, open_high=True)] = 0.7
    attention_dropout: Annotated[float, Range(0, 1, open_high=True)] = 0.3
    heads: Annotated[int, Range(1)] = 8
    graph_bias: Annotated[float, Range(0)] = 0.1
    modalities: Literal["none", "G", "GY", "L", "LGY"] = "none"
    laboratory_encoding: Literal["number", "embedding"] = "number"
    laboratory_scaling: Literal["training", "visit"] = "training"
    molecules: Literal["auto", "always", "none"] = "auto"
    relation_levels: Annotated[int, Range(2, 100)] = 6
    virtual_edges: Literal["all", "none"] = "all"
    review: bool = True
    review_quantiles: Literal["kind", "all"] = "kind"
    duplicate_state: bool = True
    direct: Literal["noisy_or", "additive", "none"] = "noisy_or"
    direct_start: Literal["effects", "even"] = "effects"
    direct_pace: Annotated[float, Range(0, open_low=True)] = 15.0

    def __post_init__(self) -> None:
        if self.dimension % self.heads:
            raise ConfigError(
                f"heads: expected a divisor of dimension = {self.dimension}, got {self.heads}"
            )


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What of a batch has a shape that depends on its content.

    Attributes:
        packing: where the codes lie.
        pairs: which visits attend to which.
        known: rows of the effects that the review looks at; None without it.
    """

    packing: Packing
    pairs: VisitPairs
    known: Rows | None


class GraphDiffMed(nn.Module):
    """GraphDiffMed over batches of patients.

    Args:
        inputs: sizes, effects, interactions and molecules.
        options: see GraphDiffMedOptions.

    Raises:
        ConfigError: if molecules or laboratory events are asked for and `inputs` has none.
    """

    ddi: torch.Tensor

    def __init__(self, inputs: ModelInputs, options: GraphDiffMedOptions) -> None:
        super().__init__()
        self.sizes = inputs.sizes
        self.options = options
        d = options.dimension
        self.embedding = embedding_table(sum(inputs.sizes), d)
        self.dropout = FastDropout(options.dropout)
        self.molecules = _molecule_branch(inputs, options)
        self.class_mask = ClassMask(d)
        self.demographics = Demographics(options.modalities, d, self.dropout)
        self.laboratory = _laboratory_encoder(inputs, options)
        num_sequences = 3 + (self.laboratory is not None)
        self.grus = ParallelGRU(num_sequences, d)
        self.intra = IntraVisitAttention(d, options.heads, options.attention_dropout)
        self.inter = InterVisitAttention(
            d, options.heads, options.attention_dropout, options.graph_bias
        )
        num_states = num_sequences * (2 if options.duplicate_state else 1)
        num_parts = num_states + self.demographics.number + 2
        self.head = blocks.Linear(num_parts * d, inputs.sizes[2])
        self.review = CausalReview(inputs, options.review_quantiles) if options.review else None
        self.direct = direct_path(inputs, options.direct, options.direct_start, options.direct_pace)
        self.register_buffer("ddi", torch.tensor(inputs.ddi, dtype=torch.float32), persistent=False)

    def prepare(self, batch: Batch, codes: Codes | None = None) -> Prepared:
        """Works out, on the host, what of a batch has a shape that depends on its content.

        Args:
            batch: B patients.
            codes: of a batch whose last visits are asked about.
        """
        host = batch.to("cpu")
        if codes is not None:
            packing = codes.packed(first_visit_slot=False, window=False)
        else:
            packing = pack(host, self.sizes, first_visit_slot=False, distinct=self.training)
        known = None
        if self.review is not None:
            known = known_codes(packing) if packing.asked is None else packing.asked.known
        return Prepared(packing, VisitPairs.of(host), known)

    def fold(self) -> None:
        """As `CafeMed.fold`."""
        if self.direct is not None:
            with torch.no_grad():
                self.direct.fold()

    def forward(self, batch: Batch, prepared: Prepared | None = None) -> torch.Tensor:
        """Gives logits for every visit from the visits before it and its known codes.

        Args:
            batch: B patients, at most T visits each.
            prepared: of this batch, on its device; None: it is prepared here.

        Returns:
            float32 (B, T, N_m), y of docs/models.md 3.6; 0 after a patient's last visit. Where
            some visits are asked about, those of these A alone, float32 (A, N_m).

        Raises:
            ArtifactError: if the batch's codes are of vocabularies of other sizes.
        """
        require_sizes(batch, self.sizes)
        if prepared is None:
            prepared = moved(self.prepare(batch), batch.counts.device)
        packing, pairs = prepared.packing, prepared.pairs
        visits = self.encode_visits(packing)
        if self.laboratory is not None:
            measured = self.laboratory(batch, visits.dtype)
            visits = torch.cat([visits, measured[:, None]], 1)
        about = self.demographics(batch, visits.dtype)
        states = self.grus(visits, packing.steps)
        bias = self.interaction_rates(pairs, packing)
        attended = [
            self.inter(torch.cat([visits, about], 1), states, pairs, bias),
            self.intra(visits, batch),
        ]
        # A layer's last state is its last output, h_k = o_k^t: o stands for both.
        state = states.flatten(1)
        parts = [state, about.flatten(1), *attended]
        if self.options.duplicate_state:
            parts.append(state)
        features = torch.cat(parts, 1)
        if packing.asked is not None:
            features = features.index_select(0, packing.asked.visits)
        logits = self.head(torch.relu(features))
        if self.review is not None and prepared.known is not None:
            logits = self.review(logits, prepared.known)
        if self.direct is not None:
            logits = self.direct(logits, packing)
        return batch.pad(logits) if packing.asked is None else logits

    def encode_visits(self, packing: Packing) -> torch.Tensor:
        """Sums of each modality's masked codes: s, float32 (V, 3, d)."""
        table: torch.Tensor = self.embedding
        if self.molecules is not None:
            first = sum(self.sizes[:2])
            table = torch.cat([table[:first], self.molecules.medications(table[first:])])
        embedded = self.dropout(packing.of_codes(table.index_select(0, packing.distinct)))
        if self.molecules is not None:
            embedded = self.molecules(embedded, packing)
        masked = self.class_mask(embedded, packing.modality, packing.classes)
        return packing.to_groups(masked).view(packing.num_visits, 3, -1)

    def interaction_rates(self, pairs: VisitPairs, packing: Packing) -> torch.Tensor:
        """Share of interacting pairs between the medications known at two visits, (P,).

        Ordered pairs, a medication with itself included; 0 where one of the visits knows none.
        """
        # Diagnoses and procedures fall into one column more, the first, which is cut off.
        column = (packing.ids - sum(self.sizes[:2]) + 1).clamp(min=0)
        given = self.ddi.new_zeros(packing.num_visits, self.sizes[2] + 1)
        given[packing.visit, column] = 1
        given = given[:, 1:]
        interacting = given @ self.ddi  # small integers, exact
        number = given.sum(1)
        found = (interacting[pairs.later] * given[pairs.earlier]).sum(1)
        return found / (number[pairs.later] * number[pairs.earlier]).clamp(min=1)


def _laboratory_encoder(
    inputs: ModelInputs, options: GraphDiffMedOptions
) -> LaboratoryEncoder | None:
    if "L" not in options.modalities:
        return None
    if inputs.num_laboratory_items == 0:
        raise ConfigError(
            f"model.modalities: expected a cohort with laboratory items for {options.modalities}, "
            "this one has none; prepare it with data.cohort.max_laboratory above 0, or use none, G "
            "or GY"
        )
    return LaboratoryEncoder(
        inputs.num_laboratory_items,
        options.dimension,
        options.laboratory_encoding,
        options.laboratory_scaling,
    )


def _molecule_branch(inputs: ModelInputs, options: GraphDiffMedOptions) -> MoleculeBranch | None:
    if options.molecules == "none" or (options.molecules == "auto" and inputs.molecules is None):
        return None
    if inputs.molecules is None:
        raise ConfigError(
            "model.molecules: expected a cohort with molecules for always, this one has none; "
            "prepare it with data.molecules=true or use model.molecules=auto"
        )
    return MoleculeBranch(
        inputs,
        inputs.molecules,
        options.dimension,
        options.relation_levels,
        options.virtual_edges,
    )
