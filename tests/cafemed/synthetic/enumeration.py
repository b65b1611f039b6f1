"""Distributions of the tiny model by going through every configuration, draft and coin."""

import itertools

import numpy as np


def code_distribution(model, previous=None, do=None):
    """Configuration of codes → its probability, given a diagnosis and a procedure.

    `do` maps codes to the values they are set to.
    """
    do = do or {}
    found = {}
    for codes in itertools.product((0, 1), repeat=5):
        if not any(codes[:3]) or not any(codes[3:]):
            continue
        probability = 1.0
        for i, present in enumerate(codes):
            if i in do:
                probability *= present == do[i]
                continue
            absent = 1 - model.code_leak[i]
            for a, b, strength in zip(model.parent, model.child, model.edge_strength, strict=True):
                if b == i and codes[a]:
                    absent *= 1 - strength
            if previous is not None and previous[i]:
                absent *= 1 - model.code_persistence[i]
            probability *= 1 - absent if present else absent
        found[codes] = probability
    total = sum(found.values())
    return {codes: probability / total for codes, probability in found.items()}


def medication_distribution(model, codes, previous):
    """Set of medications → its probability, over every draft and every coin of every pair."""
    pairs = [(a, b) for a, b in itertools.combinations(range(4), 2) if model.ddi[a, b]]
    drafted = []
    for j in range(4):
        absent = 1 - model.medication_leak[j]
        for i, m, strength in zip(model.cause, model.caused, model.cause_strength, strict=True):
            if m == j and codes[i]:
                absent *= 1 - strength
        if previous[j]:
            absent *= 1 - model.medication_persistence[j]
        drafted.append(1 - absent)
    found = {}
    for draft in itertools.product((0, 1), repeat=4):
        if not any(draft):
            continue
        p_draft = np.prod([p if y else 1 - p for p, y in zip(drafted, draft, strict=True)])
        for coins in itertools.product((0, 1), repeat=len(pairs)):
            p_coins = np.prod([model.avoidance if c else 1 - model.avoidance for c in coins])
            kept = list(draft)
            for (a, b), coin in zip(pairs, coins, strict=True):
                if coin and draft[a] and draft[b]:
                    kept[a if model.priority[a] > model.priority[b] else b] = 0
            assert any(kept)
            found[tuple(kept)] = found.get(tuple(kept), 0) + p_draft * p_coins
    total = sum(found.values())
    return {kept: probability / total for kept, probability in found.items()}


def marginals(distribution):
    return sum(np.array(kept) * p for kept, p in distribution.items())
