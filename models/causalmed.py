"""CausalMed: class masks and relational graph layers on each visit, and GRUs over visits.

All visits of a batch of patients are encoded at once and the GRUs pass over them once, as in
CafeMed, whose ancestor this is: the heterogeneous branch here is what CHARM replaces there.
"""

import dataclasses
from typing import Annotated, Literal

import torch
from torch import nn

from cafemed.batches import Batch, ModelInputs
from cafemed.config import Range
from cafemed.stepping import moved
from models import blocks
from models.asked import Codes
from models.dropout import FastDropout
from models.effect_edges import EffectRelations
from models.embeddings import embedding_table, require_sizes
from models.homogeneous import ClassMask
from models.packing import Packing, pack
from models.recurrent import ParallelGRU
from models.relational import HeterogeneousBranch, Messages


@dataclasses.dataclass(frozen=True)
class CausalMedOptions:
    """Options of CausalMed; docs/models.md says which are the published code's and which ours.

    Attributes:
        dimension: d, of embeddings, graph layers and GRUs.
        dropout: on looked-up embeddings, in training.
        dropout_shared: one draw for both branches; False: medications get another draw in the
            heterogeneous branch.
        effect_levels: classes of effects, each 1 / effect_levels wide; effects in the lowest give
            no edge.
        effect_sign: classes of E or of |E|.
        virtual_edges: at a later visit whose effects are all 0: from all medications, from the
            first one, or none (then only first visits have virtual edges).
        first_visit_slot: a first visit has one medication node, a zero vector.
        duplicate_state: the head sees [h; o] with h = o, or o once.
    """

    dimension: Annotated[int, Range(1)] = 64
    dropout: Annotated[float, Range(0, 1, open_high=True)] = 0.7
    dropout_shared: bool = True
    effect_levels: Annotated[int, Range(2, 100)] = 5
    effect_sign: Literal["signed", "absolute"] = "signed"
    virtual_edges: Literal["all", "first", "none"] = "all"
    first_visit_slot: bool = True
    duplicate_state: bool = True


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What of a batch has a shape that depends on its content.

    Attributes:
        packing: where the codes lie.
        messages: of the two graph layers.
    """

    packing: Packing
    messages: tuple[Messages, Messages]


class CausalMed(nn.Module):
    """CausalMed over batches of patients.

    Args:
        inputs: sizes and effects.
        options: see CausalMedOptions.
    """

    def __init__(self, inputs: ModelInputs, options: CausalMedOptions) -> None:
        super().__init__()
        self.sizes = inputs.sizes
        self.options = options
        d = options.dimension
        self.embedding = embedding_table(sum(inputs.sizes), d)
        self.dropout = FastDropout(options.dropout)
        self.class_mask = ClassMask(d)
        self.heterogeneous = HeterogeneousBranch(
            EffectRelations(
                inputs, options.effect_levels, options.effect_sign, options.virtual_edges
            ),
            d,
            options.first_visit_slot,
        )
        self.fusion = nn.Parameter(torch.ones(3, 2))
        self.grus = ParallelGRU(3, d)
        self.head = blocks.Linear((6 if options.duplicate_state else 3) * d, inputs.sizes[2])

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
        return Prepared(packing, self.heterogeneous.prepare(host, packing))

    def forward(self, batch: Batch, prepared: Prepared | None = None) -> torch.Tensor:
        """Gives logits for every visit from the visits before it and its known codes.

        Args:
            batch: B patients, at most T visits each.
            prepared: of this batch, on its device; None: it is prepared here.

        Returns:
            float32 (B, T, N_m), y^ of docs/models.md 2.4; 0 after a patient's last visit. Where
            some visits are asked about, those of these A alone, float32 (A, N_m).

        Raises:
            ArtifactError: if the batch's codes are of vocabularies of other sizes.
        """
        require_sizes(batch, self.sizes)
        if prepared is None:
            prepared = moved(self.prepare(batch), batch.counts.device)
        packing = prepared.packing
        visits = self.encode_visits(batch, prepared)
        # A layer's last state is its last output, h_k = o_k^t: o stands for both.
        states = self.grus(visits, packing.steps).flatten(1)
        if packing.asked is not None:
            states = states.index_select(0, packing.asked.visits)
        patient = torch.relu(states)
        if self.options.duplicate_state:
            patient = torch.cat([patient, patient], 1)
        logits: torch.Tensor = self.head(patient)
        return batch.pad(logits) if packing.asked is None else logits

    def encode_visits(self, batch: Batch, prepared: Prepared) -> torch.Tensor:
        """Both branches and their fusion: z, float32 (V, 3, d)."""
        packing = prepared.packing
        looked_up = packing.of_codes(self.embedding.index_select(0, packing.distinct))
        embedded = related = self.dropout(looked_up)
        if not self.options.dropout_shared:
            is_medication = (packing.modality == 2)[:, None]
            related = torch.where(is_medication, self.dropout(looked_up), embedded)
        masked = packing.to_groups(self.class_mask(embedded, packing.modality, packing.classes))
        homogeneous = masked.view(packing.num_visits, 3, -1)
        heterogeneous = self.heterogeneous(related, batch, packing, prepared.messages)
        fusion = self.fusion[..., None]
        z: torch.Tensor = fusion[:, 0] * homogeneous + fusion[:, 1] * heterogeneous
        return z
