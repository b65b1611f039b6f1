"""CafeMed: causal modulation, attention over the three modalities, and GRUs over visits.

All visits of a batch of patients are encoded at once; the GRUs pass over the visits once, and
their output at visit t is what the model says of visit t, since the input of visit t is its
diagnoses, its procedures and the medications of visit t - 1.
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
from models.charm import Charm, WideConvolution
from models.cwg import CausalWeightGenerator, EntityWeights
from models.direct import DirectPath, direct_path
from models.dropout import FastDropout
from models.embeddings import embedding_table, require_sizes
from models.homogeneous import NUM_CLASSES, ClassMask
from models.packing import Packing, pack
from models.recurrent import ParallelGRU
from models.sparse_map import Rows


@dataclasses.dataclass(frozen=True)
class CafeMedOptions:
    """Options of CafeMed; docs/models.md says which the paper gives and which we decided.

    Attributes:
        dimension: d, of embeddings and GRUs.
        dropout: on looked-up embeddings, in training.
        dropout_shared: one draw for both branches; False: medications get another draw in the
            second branch.
        modulation_strength: alpha of equation (3).
        learnable_modulation: alpha is learned, starting from modulation_strength.
        cwg_hidden: h of equation (2); None: d / 2.
        cwg_activation: of equation (2).
        cwg_shared: one generator for the three modalities, or one each.
        cwg_context: the mean of equation (1) over all medications, or over the previous visit's.
        standardise_effects: w is centred and scaled over all codes before equation (2).
        effect_aggregate: equation (1) over E or |E|.
        medication_weight: w of a medication: mean effect of all codes on it, or 0.
        layout: modalities side by side in CHARM's channels, or three columns.
        reduction_ratio: r of equations (5) and (10).
        shuffle_groups: g of equation (8); 1 leaves the shuffle out.
        unshuffle: undo the shuffle before the blocks are split.
        kernel_storage: keep only the kernel columns that meet data, or all of 7 x 7.
        norm_affine: instance norm learns a scale and a shift.
        gate: equation (13) from the visit's mean w, from each entity's own w, or left out.
        gate_place: the gate on CHARM's output or on its input.
        first_visit_slot: a first visit has one medication position, a zero vector.
        homogeneous_input: the class mask on raw or on modulated embeddings.
        duplicate_state: the head sees [h; o] with h = o (equation (16)), or o once.
        direct: one chance for each code and medication beside the deep path, joined to it as
            independent causes ("noisy_or") or on the log-odds ("additive"); "none": as published.
        direct_start: the direct path starts from the causal effects, or evenly.
        direct_pace: how fast the direct path learns beside all else.
        use_cwg: False: "w/o CWG", alpha = 0 and no gate.
        use_charm: False: "w/o CHARM", u = e~.
    """

    dimension: Annotated[int, Range(1)] = 64
    dropout: Annotated[float, Range(0, 1, open_high=True)] = 0.7
    dropout_shared: bool = True
    modulation_strength: Annotated[float, Range(0, 10)] = 0.1
    learnable_modulation: bool = False
    cwg_hidden: Annotated[int | None, Range(1)] = None
    cwg_activation: Literal["relu", "tanh"] = "relu"
    cwg_shared: bool = True
    cwg_context: Literal["entity", "visit"] = "entity"
    standardise_effects: bool = False
    effect_aggregate: Literal["signed", "absolute"] = "signed"
    medication_weight: Literal["mean", "zero"] = "mean"
    layout: Literal["channels", "width"] = "channels"
    reduction_ratio: Annotated[int, Range(1)] = 4
    shuffle_groups: Annotated[int, Range(1)] = 4
    unshuffle: bool = False
    kernel_storage: Literal["used", "full"] = "used"
    norm_affine: bool = False
    gate: Literal["visit", "position", "none"] = "visit"
    gate_place: Literal["output", "input"] = "output"
    first_visit_slot: bool = True
    homogeneous_input: Literal["raw", "modulated"] = "raw"
    duplicate_state: bool = True
    direct: Literal["noisy_or", "additive", "none"] = "noisy_or"
    direct_start: Literal["effects", "even"] = "effects"
    direct_pace: Annotated[float, Range(0, open_low=True)] = 15.0
    use_cwg: bool = True
    use_charm: bool = True

    def __post_init__(self) -> None:
        if self.use_charm:
            self._require_divisor("reduction_ratio", self.reduction_ratio, "")
            hint = "; the paper leaves the shuffle out then: shuffle_groups=1 does so"
            self._require_divisor("shuffle_groups", self.shuffle_groups, hint)

    @property
    def channels(self) -> int:
        """C of CHARM's maps."""
        return 3 * self.dimension if self.layout == "channels" else self.dimension

    @property
    def hidden(self) -> int:
        """h of equation (2)."""
        return self.cwg_hidden if self.cwg_hidden is not None else max(self.dimension // 2, 1)

    def _require_divisor(self, key: str, value: int, hint: str) -> None:
        if self.channels % value:
            of = "3 * dimension" if self.layout == "channels" else "dimension"
            raise ConfigError(
                f"{key}: expected a divisor of {of} = {self.channels} (CHARM's channels), "
                f"got {value}{hint}"
            )


@dataclasses.dataclass(frozen=True)
class _Folded:
    """What follows from the weights alone, of each of N codes.

    Attributes:
        modulated: float32 (N, d), e~.
        masked: float32 (N * 4, d), s of each class.
    """

    modulated: torch.Tensor
    masked: torch.Tensor


class CafeMed(nn.Module):
    """CafeMed over batches of patients.

    Args:
        inputs: sizes and effects.
        options: see CafeMedOptions.

    Attributes:
        reads_codes_alone: for visits that are asked about; so it can be recorded.
    """

    reads_codes_alone = True

    def __init__(self, inputs: ModelInputs, options: CafeMedOptions) -> None:
        super().__init__()
        self.sizes = inputs.sizes
        self.options = options
        d = options.dimension
        self.embedding = embedding_table(sum(inputs.sizes), d)
        self.entity_weights = EntityWeights(
            inputs, options.cwg_context, options.effect_aggregate, options.medication_weight
        )
        self.cwg = self._build_cwg(options) if options.use_cwg else None
        self.charm = self._build_charm(options) if options.use_charm else None
        self.class_mask = ClassMask(d)
        self.fusion = nn.Parameter(torch.ones(3, 2))
        self.dropout = FastDropout(options.dropout)
        self.grus = ParallelGRU(3, d)
        self.head = blocks.Linear((6 if options.duplicate_state else 3) * d, inputs.sizes[2])
        self.direct = direct_path(inputs, options.direct, options.direct_start, options.direct_pace)
        self._folded: _Folded | None = None

    def _build_cwg(self, options: CafeMedOptions) -> CausalWeightGenerator:
        return CausalWeightGenerator(
            self.entity_weights.table,
            dimension=options.dimension,
            hidden=options.hidden,
            activation=options.cwg_activation,
            shared=options.cwg_shared,
            standardise=options.standardise_effects,
            strength=options.modulation_strength,
            learnable=options.learnable_modulation,
        )

    def _build_charm(self, options: CafeMedOptions) -> Charm:
        return Charm(
            dimension=options.dimension,
            reduction=options.reduction_ratio,
            groups=options.shuffle_groups,
            unshuffle=options.unshuffle,
            layout=options.layout,
            storage=options.kernel_storage,
            affine=options.norm_affine,
            gate=options.gate if options.use_cwg else "none",
            gate_place=options.gate_place,
        )

    def prepare(self, batch: Batch, codes: Codes | None = None) -> Packing:
        """Works out, on the host, what of a batch has a shape that depends on its content.

        Args:
            batch: B patients.
            codes: of a batch whose last visits are asked about.
        """
        slot, window = self.options.first_visit_slot, self.charm is not None
        if codes is not None:
            return codes.packed(slot, window)
        return pack(batch, self.sizes, slot, window, distinct=self.training)

    def fold(self) -> None:
        """Works out once what follows from the weights alone, for answers in blocks.

        For a model that no longer learns: nothing looks whether weights change afterwards.
        """
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, WideConvolution | DirectPath):
                    module.fold()
            if self.cwg is None or self.options.cwg_context == "entity":
                self._folded = self._fold()

    def _fold(self) -> "_Folded":
        number = sum(self.sizes)
        ids = torch.arange(number, device=self.embedding.device)
        modality = (ids >= self.sizes[0]).long() + (ids >= sum(self.sizes[:2]))
        modulated: torch.Tensor = self.embedding
        if self.cwg is not None:
            modulated = modulated * self.cwg(self.entity_weights.table, modality)
        raw = self.options.homogeneous_input == "raw"
        of_code = (self.embedding if raw else modulated).repeat_interleave(NUM_CLASSES, 0)
        classes = torch.arange(NUM_CLASSES, device=ids.device).repeat(number)
        masked = self.class_mask(of_code, modality.repeat_interleave(NUM_CLASSES), classes)
        return _Folded(modulated, masked)

    def forward(self, batch: Batch, prepared: Packing | None = None) -> torch.Tensor:
        """Gives logits for every visit from the visits before it and its known codes.

        Args:
            batch: B patients, at most T visits each.
            prepared: of this batch, on its device; None: it is prepared here.

        Returns:
            float32 (B, T, N_m), y^ of docs/models.md 1.12; 0 after a patient's last visit. Where
            some visits are asked about, those of these A alone, float32 (A, N_m).

        Raises:
            ArtifactError: if the batch's codes are of vocabularies of other sizes.
        """
        require_sizes(batch, self.sizes)
        packing = moved(self.prepare(batch), batch.counts.device) if prepared is None else prepared
        visits = self.encode_visits(packing)
        # A layer's last state is its last output, h_k = o_k^t: o stands for both in (16).
        states = self.grus(visits, packing.steps).flatten(1)
        if packing.asked is not None:
            states = states.index_select(0, packing.asked.visits)
        patient = torch.relu(states)
        if self.options.duplicate_state:
            patient = torch.cat([patient, patient], 1)
        logits = self.head(patient)
        if self.direct is not None:
            logits = self.direct(logits, packing)
        return batch.pad(logits) if packing.asked is None else logits

    def encode_visits(self, packing: Packing) -> torch.Tensor:
        """Equations (1) to (13) and (15): z, float32 (V, 3, d)."""
        if self._folded is not None and blocks.is_fixed():
            return self._encode_folded(packing, self._folded)
        looked_up = packing.of_codes(self.embedding.index_select(0, packing.distinct))
        embedded = modulated = self.dropout(looked_up)
        weights = self.entity_weights(packing)
        if not self.options.dropout_shared:
            is_medication = (packing.modality == 2)[:, None]
            modulated = torch.where(is_medication, self.dropout(looked_up), embedded)
        if self.cwg is not None and self.options.cwg_context == "entity":
            of_distinct = self.entity_weights.table.index_select(0, packing.distinct)
            first, second = self.sizes[0], sum(self.sizes[:2])
            modality = (packing.distinct >= first).long() + (packing.distinct >= second)
            modulated = modulated * packing.of_codes(self.cwg(of_distinct, modality))
        elif self.cwg is not None:
            modulated = modulated * self.cwg(weights, packing.modality)
        raw = self.options.homogeneous_input == "raw"
        masked = self.class_mask(embedded if raw else modulated, packing.modality, packing.classes)
        if self.charm is None:
            refined = self._sum(modulated, packing)
        else:
            refined = self.charm(modulated, weights, packing)
        fusion = self.fusion[..., None]
        return fusion[:, 0] * self._sum(masked, packing) + fusion[:, 1] * refined

    def _encode_folded(self, packing: Packing, folded: "_Folded") -> torch.Tensor:
        row = packing.ids * NUM_CLASSES + packing.classes
        starts = packing.to_groups.forward.starts
        masked = Rows(row, starts, None).add_up(folded.masked).view(packing.num_visits, 3, -1)
        modulated = folded.modulated.index_select(0, packing.ids)
        if self.charm is None:
            refined = self._sum(modulated, packing)
        else:
            refined = self.charm(modulated, self.entity_weights(packing), packing)
        fusion = self.fusion[..., None]
        return fusion[:, 0] * masked + fusion[:, 1] * refined

    def _sum(self, rows: torch.Tensor, packing: Packing) -> torch.Tensor:
        """Adds up rows (N, d) of each visit and modality; (V, 3, d)."""
        return packing.to_groups(rows).view(packing.num_visits, 3, -1)
