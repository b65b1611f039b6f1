"""Channel Harmonized Attention Refinement Module (CHARM): equations (4) to (13) of CafeMed.

Feature maps are (Q, W, C): the positions of all visits (models/packing.py), columns and channels.
With `layout="channels"` the three modalities lie side by side in the channels, W = 1 and C = 3d;
with `layout="width"` they are three columns, W = 3 and C = d.
"""

import math
from typing import Literal

import torch
from torch import nn

from models import blocks
from models.packed import FoldedConvolution, convolve, normalise, sum_slots
from models.packing import Packing, sum_groups
from models.windows import KERNEL


class ChannelAttention(nn.Module):
    """Equations (4) to (7): X * sigmoid(Wb relu(Wa X + ba) + bb) on the channels of each position.

    Args:
        channels: C.
        reduction: r; Wa: C → C / r, Wb: C / r → C.
    """

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.reduce = blocks.Linear(channels, channels // reduction)
        self.expand = blocks.Linear(channels // reduction, channels)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Weighs features (Q, W, C)."""
        return features * torch.sigmoid(self.expand(torch.relu(self.reduce(features))))


def shuffle_channels(features: torch.Tensor, groups: int) -> torch.Tensor:
    """Equations (8), (9): out channel j * g + i takes in channel i * (C / g) + j.

    Args:
        features: (..., C).
        groups: g, a divisor of C. C / g undoes the shuffle by g.
    """
    channels = features.shape[-1]
    split = features.view(*features.shape[:-1], groups, channels // groups)
    return split.transpose(-1, -2).reshape(features.shape)


class WideConvolution(nn.Module):
    """A 7 x 7 convolution with padding 3 on maps that are one or three columns wide.

    On one column only the centre column of the kernel meets data, on three columns its middle
    five. `storage="used"` keeps these columns alone; `storage="full"` keeps all seven, of which
    the others never learn. Both start as a 7 x 7 convolution of PyTorch does (fan-in 49 * C_in).

    Args:
        in_channels: C_in.
        out_channels: C_out.
        width: 1 or 3, the columns of the map.
        storage: "used" or "full".
    """

    def __init__(
        self, in_channels: int, out_channels: int, width: int, storage: Literal["used", "full"]
    ) -> None:
        super().__init__()
        self.width = width
        self.used = 2 * width - 1
        columns = self.used if storage == "used" else KERNEL
        bound = 1 / math.sqrt(in_channels * KERNEL * KERNEL)
        shape = (out_channels, in_channels, KERNEL, columns)
        self.weight = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(out_channels).uniform_(-bound, bound))
        self._folded: FoldedConvolution | None = None

    def forward(self, features: torch.Tensor, packing: Packing) -> torch.Tensor:
        """Convolves within each visit: (Q, W, C_in) → (Q, W, C_out)."""
        assert packing.window is not None
        if self._folded is not None and blocks.is_fixed():
            line = self._folded(features.flatten(1), packing.window)
        else:
            weight, bias = self._line_weight(), self._line_bias()
            line = convolve(features.flatten(1), weight, bias, packing.window)
        return line.view(features.shape[0], self.width, -1)

    def fold(self) -> None:
        """See `CafeMed.fold`."""
        self._folded = FoldedConvolution(self._line_weight(), self._line_bias())

    def _line_weight(self) -> torch.Tensor:
        """The kernel of the equal 1-D convolution, (W * C_out, W * C_in, 7)."""
        first = (self.weight.shape[3] - self.used) // 2
        if self.width == 1:
            return self.weight[:, :, :, first]
        # Column a of the output meets column b of the input through kernel column b - a + 3.
        centre = first + self.width - 1
        rows = [
            torch.cat([self.weight[:, :, :, b - a + centre] for b in range(self.width)], 1)
            for a in range(self.width)
        ]
        return torch.cat(rows, 0)

    def _line_bias(self) -> torch.Tensor:
        return self.bias.repeat(self.width) if self.width > 1 else self.bias


class PackedInstanceNorm(nn.Module):
    """IN of equations (10), (11): per visit and channel, over the positions and columns of a visit.

    Biased variance, eps 1e-5, no running statistics. A map of one element has no variance: it
    becomes 0.

    Args:
        channels: C.
        affine: whether a scale (from 1) and a shift (from 0) are learned for each channel.
    """

    def __init__(self, channels: int, affine: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels)) if affine else None
        self.shift = nn.Parameter(torch.zeros(channels)) if affine else None

    def forward(self, features: torch.Tensor, packing: Packing) -> torch.Tensor:
        """Normalises (Q, W, C)."""
        width = features.shape[1]
        visit = packing.position_visit
        visit = visit.repeat_interleave(width) if width > 1 else visit
        starts, number = packing.starts * width, packing.lengths * width
        out = normalise(features.flatten(0, 1), visit, starts, number)
        if self.scale is not None and self.shift is not None:
            out = out * self.scale + self.shift
        return out.view_as(features)


class SpatialAttention(nn.Module):
    """Equations (10) to (12): X * sigmoid(IN(conv(relu(IN(conv(X))))))."""

    def __init__(
        self,
        channels: int,
        reduction: int,
        width: int,
        storage: Literal["used", "full"],
        affine: bool,
    ) -> None:
        super().__init__()
        reduced = channels // reduction
        self.first = WideConvolution(channels, reduced, width, storage)
        self.first_norm = PackedInstanceNorm(reduced, affine)
        self.second = WideConvolution(reduced, channels, width, storage)
        self.second_norm = PackedInstanceNorm(channels, affine)

    def forward(self, features: torch.Tensor, packing: Packing) -> torch.Tensor:
        """Weighs features (Q, W, C)."""
        hidden = torch.relu(self.first_norm(self.first(features, packing), packing))
        return features * torch.sigmoid(self.second_norm(self.second(hidden, packing), packing))


class CausalGate(nn.Module):
    """Equation (13): a gate sigmoid(Wg w + bg) on the channels, Wg: 1 → C.

    `by="visit"`: w is the mean over all codes of the visit, 0 if it has none, and the gate is the
    same at all its positions. `by="position"`: w is that of the entity at each position and block,
    0 where there is none.
    """

    def __init__(self, channels: int, by: Literal["visit", "position"]) -> None:
        super().__init__()
        self.by = by
        self.linear = blocks.Linear(1, channels)

    def of_visits(self, weights: torch.Tensor, packing: Packing) -> torch.Tensor:
        """The gate of each visit, (V, C), from w (N,) of the codes; for `by="visit"`."""
        number = sum_groups(torch.ones_like(weights), packing.visit, packing.num_visits)
        total = sum_groups(weights, packing.visit, packing.num_visits)
        mean = total / number.clamp(min=1.0)
        return torch.sigmoid(self.linear(mean[:, None]))

    def forward(
        self, features: torch.Tensor, weights: torch.Tensor, packing: Packing
    ) -> torch.Tensor:
        """Gates features (Q, W, C) with w (N,) of the codes."""
        if self.by == "visit":
            gate = self.of_visits(weights, packing)
            return features * gate.index_select(0, packing.position_visit)[:, None]
        of_cell = weights.new_zeros(packing.num_positions * 3).index_copy(0, packing.cell, weights)
        blocks = of_cell.view(packing.num_positions, 3)
        width, channels = features.shape[1:]
        spread = blocks.repeat_interleave(width * channels // 3, 1).view_as(features)
        gate = torch.sigmoid(spread * self.linear.weight[:, 0] + self.linear.bias)
        return features * gate


class Charm(nn.Module):
    """CHARM from the modulated embeddings of a batch to their refined sums.

    Args:
        dimension: d.
        reduction: r.
        groups: g of the channel shuffle; 1 leaves it out.
        unshuffle: whether the shuffle is undone before the blocks are split.
        layout: see the module.
        storage: see WideConvolution.
        affine: see PackedInstanceNorm.
        gate: see CausalGate; "none" leaves equation (13) out.
        gate_place: "output": on the refined features; "input": on X before equation (4).
    """

    def __init__(
        self,
        *,
        dimension: int,
        reduction: int,
        groups: int,
        unshuffle: bool,
        layout: Literal["channels", "width"],
        storage: Literal["used", "full"],
        affine: bool,
        gate: Literal["visit", "position", "none"],
        gate_place: Literal["output", "input"],
    ) -> None:
        super().__init__()
        self.width = 1 if layout == "channels" else 3
        self.channels = 3 * dimension // self.width
        self.blocks = 3 // self.width  # modalities in the channels
        self.groups = groups
        self.unshuffle = unshuffle
        self.channel_attention = ChannelAttention(self.channels, reduction)
        self.spatial_attention = SpatialAttention(
            self.channels, reduction, self.width, storage, affine
        )
        self.gate = None if gate == "none" else CausalGate(self.channels, gate)
        self.gate_place = gate_place

    def forward(
        self, modulated: torch.Tensor, weights: torch.Tensor, packing: Packing
    ) -> torch.Tensor:
        """Refines the embeddings.

        Args:
            modulated: e~, float32 (N, d).
            weights: w, float32 (N,).
            packing: where the N codes lie.

        Returns:
            float32 (V, 3, d), u added up over the slots of each visit and modality.
        """
        features = self._align(modulated, packing)
        if self.gate is not None and self.gate_place == "input":
            features = self.gate(features, weights, packing)
        features = shuffle_channels(self.channel_attention(features), self.groups)
        features = self.spatial_attention(features, packing)
        if self.unshuffle:
            features = shuffle_channels(features, self.channels // self.groups)
        if self.gate is None or self.gate_place == "input":
            return self._leave(features, packing)
        if self.gate.by == "visit":
            # The same at all positions of a visit: the sum is gated, not its every term.
            gate = self.gate.of_visits(weights, packing)
            return self._leave(features, packing) * gate.view(packing.num_visits, self.blocks, -1)
        return self._leave(self.gate(features, weights, packing), packing)

    def _align(self, modulated: torch.Tensor, packing: Packing) -> torch.Tensor:
        """X of docs/models.md 1.3: embeddings at their cells, 0 elsewhere; (Q, W, C)."""
        cells = modulated.new_zeros(packing.num_positions * 3, modulated.shape[1])
        cells.index_copy_(0, packing.cell, modulated)
        return cells.view(packing.num_positions, self.width, self.channels)

    def _leave(self, features: torch.Tensor, packing: Packing) -> torch.Tensor:
        """Splits (Q, W, C) into blocks again and adds up their slots; (V, 3, d)."""
        cells = features.reshape(packing.num_positions * 3, -1)
        return sum_slots(cells, packing).view(packing.num_visits, 3, -1)
