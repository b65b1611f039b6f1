"""Which pairs of code and medication are confounded in a graph whose edges are all directed."""

import numpy as np
from numpy.typing import NDArray

from cafemed.graphs import CausalGraph


def confounded(
    graph: CausalGraph,
    codes: tuple[str, ...],
    medications: tuple[str, ...],
    *,
    through_medications: bool = False,
) -> NDArray[np.bool_]:
    """Says of every pair whether code and medication have a common cause.

    That is a node with a directed path to the code, and another to the medication that does not
    pass through the code: what makes P(m | code) differ from P(m | do(code)).

    Args:
        graph: directed edges (`truth.graph_of`); undirected ones are not followed.
        codes, medications: node names, distinct.
        through_medications: also follow paths that pass through another medication. In the
            generative model that is striking, which confounds four times as many pairs by little.

    Returns:
        bool (codes, medications).
    """
    children: dict[int, list[int]] = {}
    parents: dict[int, list[int]] = {}
    edges = zip(graph.source[graph.directed], graph.target[graph.directed], strict=True)
    for source, target in edges:
        children.setdefault(int(source), []).append(int(target))
        parents.setdefault(int(target), []).append(int(source))
    position = {name: i for i, name in enumerate(graph.nodes)}
    column = {position[name]: j for j, name in enumerate(medications) if name in position}
    if not through_medications:
        children = {node: kids for node, kids in children.items() if node not in column}
    found = np.zeros((len(codes), len(medications)), np.bool_)
    for i, code in enumerate(codes):
        if code in position:
            causes = _reached([position[code]], parents, avoiding=-1) - {position[code]}
            reached = _reached(list(causes), children, avoiding=position[code])
            found[i, [column[node] for node in reached if node in column]] = True
    return found


def _reached(start: list[int], following: dict[int, list[int]], avoiding: int) -> set[int]:
    """The start and all that edges lead to from it without passing through `avoiding`."""
    seen = set(start)
    waiting = list(start)
    while waiting:
        for node in following.get(waiting.pop(), ()):
            if node != avoiding and node not in seen:
                seen.add(node)
                waiting.append(node)
    return seen
