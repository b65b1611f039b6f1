"""CafeMed one visit at a time, written from the equations; shares no code with `models`.

Everything is a loop over codes or visits on plain double-precision tensors; maps are
(1, C, H, W) as in the paper, convolutions are 7 x 7 `conv2d`. Dropout is left out (evaluation).
"""

import torch


def patient_logits(weights, effects, sizes, options, visits):
    """Logits of every visit of one patient, (T, N_m).

    Args:
        weights: name → double tensor, the model's state dict.
        effects: double (N_d + N_p, N_m).
        sizes: (N_d, N_p, N_m).
        options: the options' values by name.
        visits: per visit a dict: "codes": three lists of ids, "classes": three lists.
    """
    inputs = [
        _encode_visit(weights, effects, sizes, options, visit, t == 0)
        for t, visit in enumerate(visits)
    ]
    logits = []
    for t in range(len(visits)):
        outputs = [_gru(weights, k, [z[k] for z in inputs[: t + 1]]) for k in range(3)]
        last = [o[-1] for o in outputs]
        state = torch.cat([*last, *last] if options["duplicate_state"] else last)
        y = weights["head.weight"] @ state.clamp(min=0) + weights["head.bias"]
        logits.append(_direct(weights, sizes, options, visits[t], y))
    return torch.stack(logits)


def _direct(weights, sizes, options, visit, y):
    """The direct path: the deep path and each code as causes, by their chances."""
    if options["direct"] == "none":
        return y
    offset, pace = (0, sizes[0], sizes[0] + sizes[1]), options["direct_pace"]
    none_of_codes = torch.ones_like(y)
    for k in range(3):
        for code in visit["codes"][k]:
            chance = torch.sigmoid(pace * weights["direct.table"][offset[k] + code])
            none_of_codes = none_of_codes * (1 - chance)
    if options["direct"] == "additive":
        return y - torch.log(none_of_codes)
    none = (1 - torch.sigmoid(y)) * none_of_codes
    return torch.log(1 - none) - torch.log(none)


def _entity_weight(effects, sizes, options, visit, k, code):
    """Equation (1)."""
    table = effects.abs() if options["effect_aggregate"] == "absolute" else effects
    if k == 2:
        return (
            table[:, code].mean() if options["medication_weight"] == "mean" else table.new_zeros(())
        )
    row = table[code + (sizes[0] if k == 1 else 0)]
    if options["cwg_context"] == "visit" and visit["codes"][2]:
        return row[visit["codes"][2]].mean()
    return row.mean()


def _all_entity_weights(effects, sizes, options):
    nothing = {"codes": [[], [], []]}
    every = [(k, code) for k in range(3) for code in range(sizes[k])]
    return torch.stack(
        [_entity_weight(effects, sizes, options, nothing, k, code) for k, code in every]
    )


def _modulate(weights, effects, sizes, options, e, w, k):
    """Equations (2) and (3)."""
    network = f"cwg.networks.{0 if options['cwg_shared'] else k}"
    if options["standardise_effects"]:
        every = _all_entity_weights(effects, sizes, options)
        w = (w - every.mean()) / ((every - every.mean()) ** 2).mean().sqrt()
    hidden = weights[f"{network}.expand.weight"][:, 0] * w + weights[f"{network}.expand.bias"]
    hidden = hidden.clamp(min=0) if options["cwg_activation"] == "relu" else hidden.tanh()
    v = weights[f"{network}.project.weight"] @ hidden + weights[f"{network}.project.bias"]
    alpha = weights.get("cwg.strength", options["modulation_strength"])
    return e * (1 + alpha * torch.sigmoid(v))


def _encode_visit(weights, effects, sizes, options, visit, is_first):
    """z_k of equation (15) for one visit: three vectors."""
    d = options["dimension"]
    offset = (0, sizes[0], sizes[0] + sizes[1])
    raw, modulated, w = [[], [], []], [[], [], []], [[], [], []]
    for k in range(3):
        for code in visit["codes"][k]:
            e = weights["embedding"][offset[k] + code]
            weight = _entity_weight(effects, sizes, options, visit, k, code)
            raw[k].append(e)
            w[k].append(weight)
            modulated[k].append(
                _modulate(weights, effects, sizes, options, e, weight, k)
                if options["use_cwg"]
                else e
            )
    refined = modulated
    if options["use_charm"]:
        refined = _charm(weights, options, modulated, w, is_first)
    z = []
    for k in range(3):
        s, u = torch.zeros(d, dtype=torch.float64), torch.zeros(d, dtype=torch.float64)
        source = raw if options["homogeneous_input"] == "raw" else modulated
        for e, c in zip(source[k], visit["classes"][k], strict=True):
            s = s + e * weights["class_mask.mask"][k, c]
        for row in refined[k]:
            u = u + row
        z.append(weights["fusion"][k, 0] * s + weights["fusion"][k, 1] * u)
    return z


def _charm(weights, options, modulated, w, is_first):
    """Equations (4) to (13); gives three lists of vectors."""
    d = options["dimension"]
    length = max(1, *(len(rows) for rows in modulated))
    by_channels = options["layout"] == "channels"
    C, W = (3 * d, 1) if by_channels else (d, 3)
    X = torch.zeros(1, C, length, W, dtype=torch.float64)
    for k in range(3):
        for h, row in enumerate(modulated[k]):
            if by_channels:
                X[0, k * d : (k + 1) * d, h, 0] = row
            else:
                X[0, :, h, k] = row
    gate = _gate(weights, options, w, X.shape)
    if options["gate_place"] == "input":
        X = X * gate
    # Equations (4) to (7).
    p = X.permute(0, 2, 3, 1)
    name = "charm.channel_attention"
    z = p @ weights[f"{name}.reduce.weight"].T + weights[f"{name}.reduce.bias"]
    z = z.clamp(min=0) @ weights[f"{name}.expand.weight"].T + weights[f"{name}.expand.bias"]
    Xc = X * torch.sigmoid(z).permute(0, 3, 1, 2)
    # Equations (8) and (9).
    g = options["shuffle_groups"]
    Xs = torch.empty_like(Xc)
    for i in range(g):
        for j in range(C // g):
            Xs[:, j * g + i] = Xc[:, i * (C // g) + j]
    # Equations (10) to (12).
    name = "charm.spatial_attention"
    F1 = _norm(weights, f"{name}.first_norm", _conv(weights, f"{name}.first", Xs)).clamp(min=0)
    Ms = torch.sigmoid(_norm(weights, f"{name}.second_norm", _conv(weights, f"{name}.second", F1)))
    Xo = Xs * Ms
    if options["unshuffle"]:
        back = torch.empty_like(Xo)
        for i in range(g):
            for j in range(C // g):
                back[:, i * (C // g) + j] = Xo[:, j * g + i]
        Xo = back
    if options["gate_place"] == "output":
        Xo = Xo * gate
    # What leaves: the positions that hold a code, and a first visit's medication slot.
    kept = [len(rows) for rows in modulated]
    if is_first and options["first_visit_slot"]:
        kept[2] = max(kept[2], 1)
    if by_channels:
        return [[Xo[0, k * d : (k + 1) * d, h, 0] for h in range(kept[k])] for k in range(3)]
    return [[Xo[0, :, h, k] for h in range(kept[k])] for k in range(3)]


def _gate(weights, options, w, shape):
    """Equation (13)."""
    gate = torch.ones(shape, dtype=torch.float64)
    if options["gate"] == "none" or not options["use_cwg"]:
        return gate
    Wg, bg = weights["charm.gate.linear.weight"][:, 0], weights["charm.gate.linear.bias"]
    if options["gate"] == "visit":
        every = [x for block in w for x in block]
        mean = sum(every) / len(every) if every else 0.0
        return gate * torch.sigmoid(Wg * mean + bg)[None, :, None, None]
    _, C, H, W = shape
    for c in range(C):
        for h in range(H):
            for column in range(W):
                k = c // (C // 3) if W == 1 else column
                own = w[k][h] if h < len(w[k]) else 0.0
                gate[0, c, h, column] = torch.sigmoid(Wg[c] * own + bg[c])
    return gate


def _conv(weights, name, X):
    stored = weights[f"{name}.weight"]
    out_channels, in_channels = stored.shape[:2]
    # Columns of the 7 x 7 kernel that are not stored hold noise: they must never matter.
    noise = torch.Generator().manual_seed(1)
    kernel = torch.randn(out_channels, in_channels, 7, 7, generator=noise, dtype=torch.float64)
    first = (7 - stored.shape[3]) // 2
    kernel[:, :, :, first : first + stored.shape[3]] = stored
    return torch.nn.functional.conv2d(X, kernel, weights[f"{name}.bias"], padding=3)


def _norm(weights, name, X):
    out = torch.zeros_like(X)
    for c in range(X.shape[1]):
        values = X[0, c]
        mean = values.sum() / values.numel()
        variance = ((values - mean) ** 2).sum() / values.numel()
        out[0, c] = (values - mean) / torch.sqrt(variance + 1e-5)
        if f"{name}.scale" in weights:
            out[0, c] = out[0, c] * weights[f"{name}.scale"][c] + weights[f"{name}.shift"][c]
    return out


def _gru(weights, k, inputs):
    """PyTorch's GRU from its documented equations, h_0 = 0."""
    W_i, b_i = weights["grus.weight_ih"][k], weights["grus.bias_ih"][k]
    W_h, b_h = weights["grus.weight_hh"][k], weights["grus.bias_hh"][k]
    h = torch.zeros(W_h.shape[1], dtype=torch.float64)
    outputs = []
    for x in inputs:
        ir, iz, i_n = (W_i @ x + b_i).chunk(3)
        hr, hz, hn = (W_h @ h + b_h).chunk(3)
        r, z = torch.sigmoid(ir + hr), torch.sigmoid(iz + hz)
        n = torch.tanh(i_n + r * hn)
        h = (1 - z) * n + z * h
        outputs.append(h)
    return outputs
