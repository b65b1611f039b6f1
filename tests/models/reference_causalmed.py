"""CausalMed one visit at a time, written from the equations; shares no code with `models`.

Everything is a loop over nodes, relations and visits on plain double-precision tensors. Dropout is
left out (evaluation).
"""

import math

import torch


def patient_logits(weights, effects, sizes, options, visits):
    """Logits of every visit of one patient, (T, N_m): every prefix is run anew.

    Args:
        weights: name → double tensor, the model's state dict.
        effects: double (N_d + N_p, N_m).
        sizes: (N_d, N_p, N_m).
        options: the options' values by name.
        visits: per visit a dict: "codes": three lists of ids, "classes": three lists.
    """
    logits = []
    for t in range(len(visits)):
        sequences = [[], [], []]
        for s, visit in enumerate(visits[: t + 1]):
            for k, z in enumerate(_encode_visit(weights, effects, sizes, options, visit, s == 0)):
                sequences[k].append(z)
        last = [_gru(weights, k, sequences[k]) for k in range(3)]
        state = torch.cat([*last, *last] if options["duplicate_state"] else last)
        logits.append(weights["head.weight"] @ state.clamp(min=0) + weights["head.bias"])
    return torch.stack(logits)


def _encode_visit(weights, effects, sizes, options, visit, is_first):
    """z_k for one visit: three vectors."""
    d = options["dimension"]
    offset = (0, sizes[0], sizes[0] + sizes[1])
    embedded = [
        [weights["embedding"][offset[k] + code] for code in visit["codes"][k]] for k in range(3)
    ]
    nodes, blocks = [], [[], [], []]
    for k in range(3):
        for e in embedded[k]:
            blocks[k].append(len(nodes))
            nodes.append(e)
    if is_first and options["first_visit_slot"]:
        blocks[2].append(len(nodes))
        nodes.append(torch.zeros(d, dtype=torch.float64))
    edges = _edges(effects, sizes, options, visit, is_first, blocks)
    hidden = [h.clamp(min=0) for h in _layer(weights, "heterogeneous.first", nodes, edges)]
    out = _layer(weights, "heterogeneous.second", hidden, edges)
    z = []
    for k in range(3):
        s, u = torch.zeros(d, dtype=torch.float64), torch.zeros(d, dtype=torch.float64)
        for e, c in zip(embedded[k], visit["classes"][k], strict=True):
            s = s + e * weights["class_mask.mask"][k, c]
        for node in blocks[k]:
            u = u + out[node]
        z.append(weights["fusion"][k, 0] * s + weights["fusion"][k, 1] * u)
    return z


def _edges(effects, sizes, options, visit, is_first, blocks):
    """Edges (from, to, relation) of a visit's graph."""
    levels = options["effect_levels"]
    edges = []
    for k in range(2):
        virtual, offset = k * (levels + 1), (0, sizes[0])[k]
        matrix = [
            [float(effects[offset + code, m]) for m in visit["codes"][2]]
            for code in visit["codes"][k]
        ]
        if is_first:
            # The only medication is the zero vector, if there is one, and has no effects.
            edges += [(m, x, virtual) for m in blocks[2] for x in blocks[k]]
        elif all(effect == 0 for row in matrix for effect in row):
            senders = {"all": blocks[2], "first": blocks[2][:1], "none": []}
            edges += [(m, x, virtual) for m in senders[options["virtual_edges"]] for x in blocks[k]]
        else:
            for x, row in zip(blocks[k], matrix, strict=True):
                for m, effect in zip(blocks[2], row, strict=True):
                    size = abs(effect) if options["effect_sign"] == "absolute" else effect
                    level = min(math.ceil(size * levels) - 1, levels)  # b/c < E <= (b + 1)/c
                    if level >= 1:
                        edges.append((m, x, virtual + level))
    return edges


def _layer(weights, name, nodes, edges):
    """One relational layer over all nodes."""
    out = []
    for i, x in enumerate(nodes):
        total = x @ weights[f"{name}.root"] + weights[f"{name}.bias"]
        for relation, matrix in enumerate(weights[f"{name}.weight"]):
            senders = [nodes[a] for a, b, r in edges if b == i and r == relation]
            if senders:
                total = total + (sum(senders) / len(senders)) @ matrix
        out.append(total)
    return out


def _gru(weights, k, inputs):
    """The last output of PyTorch's GRU from its documented equations, h_0 = 0."""
    W_i, b_i = weights["grus.weight_ih"][k], weights["grus.bias_ih"][k]
    W_h, b_h = weights["grus.weight_hh"][k], weights["grus.bias_hh"][k]
    h = torch.zeros(W_h.shape[1], dtype=torch.float64)
    for x in inputs:
        ir, iz, i_n = (W_i @ x + b_i).chunk(3)
        hr, hz, hn = (W_h @ h + b_h).chunk(3)
        r, z = torch.sigmoid(ir + hr), torch.sigmoid(iz + hz)
        n = torch.tanh(i_n + r * hn)
        h = (1 - z) * n + z * h
    return h
