"""GraphDiffMed one visit prefix at a time, from the equations; shares no code with `models`.

Everything is a loop over nodes, heads, tokens and visits on plain double-precision tensors, in the
published form: attention with one key goes through queries, keys and a softmax, and a medication's
molecules through a graph layer on their complete graph with softmax weights. The weights that only
these steps have are drawn at random here: the answer must not depend on them. Dropout is left out
(evaluation).
"""

import math
import random

import torch


def patient_logits(weights, inputs, options, visits, sex, ages, events):
    """Logits of every visit of one patient, (T, N_m): every prefix is run anew.

    Args:
        weights: name → double tensor, the model's state dict.
        inputs: a dict: "sizes", "effects" (list of lists), "ddi" (list of lists), "molecules" (list
            of lists, or None), "num_laboratory_items".
        options: the options' values by name.
        visits: per visit a dict: "codes": three lists of ids, "classes": three lists.
        sex: 0, 1 or 2.
        ages: per visit, scaled; NaN where unknown.
        events: per visit a list of pairs of a laboratory item and its scaled value.
    """
    return torch.stack(
        [
            _last_visit(weights, inputs, options, visits[: t + 1], sex, ages[t], events[: t + 1])
            for t in range(len(visits))
        ]
    )


def _last_visit(weights, inputs, options, visits, sex, age, events):
    d, last = options["dimension"], len(visits) - 1
    sums = [_encode_visit(weights, inputs, options, visit) for visit in visits]
    if "L" in options["modalities"]:
        for s, measured in zip(sums, events, strict=True):
            s.append(_measurements(weights, inputs["num_laboratory_items"], options, measured))
    sequences = range(len(sums[0]))
    states = [_gru(weights, k, [s[k] for s in sums]) for k in sequences]
    about = _demographics(weights, options, sex, age)
    inter, intra = torch.zeros(d, dtype=torch.float64), torch.zeros(d, dtype=torch.float64)
    if last > 0:
        for s in sums:
            for k in sequences:
                if k == 2:
                    continue
                intra = intra + _attention(weights, "intra", options, [s[2]], [s[k]], None)[0]
        keys = [states[k][v] for k in sequences for v in range(last)]
        tokens = [*sums[last], *about]
        bias = [[0.0] * len(keys) for _ in tokens]
        for v in range(last):
            bias[2][2 * last + v] = _interaction_rate(
                inputs["ddi"], visits[last]["codes"][2], visits[v]["codes"][2]
            )
        for out in _attention(weights, "inter", options, tokens, keys, bias):
            inter = inter + out
    final = [states[k][last] for k in sequences]
    parts = [*final, *about, inter, intra, *(final if options["duplicate_state"] else [])]
    state = torch.relu(torch.cat(parts))  # whose slope at 0 is 0: a vector of 0 begins there
    logits = weights["head.weight"] @ state + weights["head.bias"]
    if options["review"]:
        logits = _review(weights, inputs, options, logits, visits[last]["codes"])
    if options["direct"] != "none":
        logits = _direct(weights, inputs["sizes"], options, logits, visits[last]["codes"])
    return logits


def _encode_visit(weights, inputs, options, visit):
    """s_k for one visit: three vectors."""
    sizes, d = inputs["sizes"], options["dimension"]
    offset = (0, sizes[0], sizes[0] + sizes[1])
    vectors = [
        [weights["embedding"][offset[k] + code] for code in visit["codes"][k]] for k in range(3)
    ]
    if inputs["molecules"] is not None and options["molecules"] != "none":
        for k, kind in enumerate(("diagnosis", "procedure")):
            rows = [_relevance(inputs, offset[k] + code) for code in visit["codes"][k]]
            vectors[k] = _relational(weights, kind, options, vectors[k], rows)
        for i, medication in enumerate(visit["codes"][2]):
            chosen = [c for c, has in enumerate(inputs["molecules"][medication]) if has]
            if chosen:
                vectors[2][i] = _molecular_vector(weights, chosen)
    return [
        sum(
            (
                e * weights["class_mask.mask"][k, c]
                for e, c in zip(vectors[k], visit["classes"][k], strict=True)
            ),
            torch.zeros(d, dtype=torch.float64),
        )
        for k in range(3)
    ]


def _relevance(inputs, code):
    """R of a code to every molecule."""
    effects, molecules = inputs["effects"][code], inputs["molecules"]
    return [
        sum(effect for effect, row in zip(effects, molecules, strict=True) if row[c])
        for c in range(len(molecules[0]))
    ]


def _relational(weights, kind, options, codes, relevance):
    """Two relational layers over a visit's codes of a kind and all molecules."""
    levels = options["relation_levels"]
    molecules = list(weights["molecules.embedding"])
    edges = []  # molecule, code, relation
    if all(value == 0 for row in relevance for value in row):
        if options["virtual_edges"] == "all":
            edges = [(c, x, 0) for c in range(len(molecules)) for x in range(len(codes))]
    else:
        for x, row in enumerate(relevance):
            for c, value in enumerate(row):
                for b in range(1, levels):
                    if b / levels < value <= (b + 1) / levels:
                        edges.append((c, x, b))
    nodes = [*codes, *molecules]
    edges = [(len(codes) + c, x, b) for c, x, b in edges]
    hidden = [h.clamp(min=0) for h in _layer(weights, f"molecules.first.{kind}", nodes, edges)]
    return _layer(weights, f"molecules.second.{kind}", hidden, edges)[: len(codes)]


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


def _molecular_vector(weights, chosen):
    """A graph isomorphism layer on the complete graph of the molecules, softmax-weighted."""
    molecules = [weights["molecules.embedding"][c] for c in chosen]
    learned = torch.randn(len(chosen), dtype=torch.float64)
    shares = torch.exp(learned) / torch.exp(learned).sum()
    total = 0
    for i, own in enumerate(molecules):
        x = own + sum(other for j, other in enumerate(molecules) if j != i)
        for layer in ("0", "2"):
            x = weights[f"molecules.medication.{layer}.weight"] @ x
            x = x + weights[f"molecules.medication.{layer}.bias"]
            x = x.clamp(min=0) if layer == "0" else x
        total = total + shares[i] * x
    return total


def _demographics(weights, options, sex, age):
    about = []
    if "G" in options["modalities"]:
        about.append(weights["demographics.sex"][sex])
    if "Y" in options["modalities"]:
        known = 0.0 if math.isnan(age) else age
        about.append(
            weights["demographics.age.weight"][:, 0] * known + weights["demographics.age.bias"]
        )
    return about


def _measurements(weights, number, options, events):
    """The sum over a visit's laboratory events."""
    total = torch.zeros(options["dimension"], dtype=torch.float64)
    mean = sum(range(number)) / number
    sd = math.sqrt(sum((i - mean) ** 2 for i in range(number)) / number) or 1.0
    numbers, values = [(i - mean) / sd for i, _ in events], [x for _, x in events]
    if options["laboratory_scaling"] == "visit":
        numbers, values = _standardised(numbers), _standardised(values)
    for (item, _), n, x in zip(events, numbers, values, strict=True):
        if options["laboratory_encoding"] == "number":
            given = torch.tensor([n, x], dtype=torch.float64)
            out = weights["laboratory.events.weight"] @ given + weights["laboratory.events.bias"]
        else:
            alone, slope = weights["laboratory.items"][item].chunk(2)
            out = alone + x * slope
        total = total + torch.relu(out)
    return total


def _standardised(values):
    mean = sum(values) / max(len(values), 1)
    sd = math.sqrt(sum((x - mean) ** 2 for x in values) / max(len(values), 1))
    return [(x - mean) / sd if sd > 0 else 0.0 for x in values]


def _interaction_rate(ddi, one, other):
    pairs = [(a, b) for a in one for b in other]
    return sum(ddi[a][b] for a, b in pairs) / len(pairs) if pairs else 0.0


def _attention(weights, name, options, tokens, keys, bias):
    """Differential attention: one output for every token."""
    d, heads = options["dimension"], options["heads"]
    width = d // heads

    def linear(part, x, rows):
        if f"{name}.{part}.weight" not in weights:
            # Within a visit there is one key: whatever its score, its share is 1.
            generator = torch.Generator().manual_seed(random.randrange(1000))
            return torch.randn(rows, d, dtype=torch.float64, generator=generator) @ x
        return weights[f"{name}.{part}.weight"] @ x + weights[f"{name}.{part}.bias"]

    out = []
    for i, x in enumerate(tokens):
        query = linear("query", x, 2 * d).view(2 * heads, width)
        gate = torch.sigmoid(linear("gate", x, heads))
        context = []
        for h in range(2 * heads):
            scores, values = [], []
            for j, y in enumerate(keys):
                key = linear("key", y, d).view(heads, width)[h // 2]
                values.append(linear("value", y, d).view(heads, width)[h // 2])
                score = (query[h] * key).sum() / math.sqrt(width)
                scores.append(score + (options["graph_bias"] * bias[i][j] if bias else 0.0))
            shares = torch.softmax(torch.stack(scores), 0)
            context.append(sum(share * v for share, v in zip(shares, values, strict=True)))
        pairs = [context[2 * h] - gate[h] * context[2 * h + 1] for h in range(heads)]
        out.append(linear("output", torch.cat(pairs), d))
    return out


def _quantile(values, share):
    """With linear interpolation between the sorted values."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def _review(weights, inputs, options, logits, codes):
    num_diagnoses, effects = inputs["sizes"][0], inputs["effects"]
    rows = {0: effects[:num_diagnoses], 1: effects[num_diagnoses:]}
    limits = {}
    for k in (0, 1):
        of = effects if options["review_quantiles"] == "all" else rows[k]
        values = [value for row in of for value in row]
        limits[k] = (_quantile(values, 0.90), _quantile(values, 0.97))
    reviewed = []
    for m, logit in enumerate(logits):
        largest = [max([0.0, *(rows[k][code][m] for code in codes[k])]) for k in (0, 1)]
        if all(largest[k] < limits[k][0] for k in (0, 1)):
            reviewed.append(logit - weights["review.lowering"])
        elif any(largest[k] > limits[k][1] for k in (0, 1)):
            reviewed.append(logit + weights["review.raising"])
        else:
            reviewed.append(logit)
    return torch.stack(reviewed)


def _direct(weights, sizes, options, logits, codes):
    offset, pace = (0, sizes[0], sizes[0] + sizes[1]), options["direct_pace"]
    of_none = torch.ones_like(logits)
    for k in range(3):
        for code in codes[k]:
            chance = torch.sigmoid(pace * weights["direct.table"][offset[k] + code])
            of_none = of_none * (1 - chance)
    if options["direct"] == "additive":
        return logits - torch.log(of_none)
    of_none = of_none * (1 - torch.sigmoid(logits))
    return torch.log(1 - of_none) - torch.log(of_none)


def _gru(weights, k, inputs):
    """All outputs of PyTorch's GRU from its documented equations, h_0 = 0."""
    W_i, b_i = weights["grus.weight_ih"][k], weights["grus.bias_ih"][k]
    W_h, b_h = weights["grus.weight_hh"][k], weights["grus.bias_hh"][k]
    h, outputs = torch.zeros(W_h.shape[1], dtype=torch.float64), []
    for x in inputs:
        ir, iz, i_n = (W_i @ x + b_i).chunk(3)
        hr, hz, hn = (W_h @ h + b_h).chunk(3)
        r, z = torch.sigmoid(ir + hr), torch.sigmoid(iz + hz)
        n = torch.tanh(i_n + r * hn)
        h = (1 - z) * n + z * h
        outputs.append(h)
    return outputs
