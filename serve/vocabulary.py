"""Search of the codes that a model knows: by how they begin, and by the words of their names."""

import dataclasses
from collections.abc import Mapping, Sequence

from cafemed.names import Names
from serve.answers import Kind, KnownCode

_KINDS: tuple[Kind, ...] = ("diagnosis", "procedure", "medication", "laboratory")


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A code as it is searched: without its system, with it, and its name's words."""

    code: str
    full: str
    words: tuple[str, ...]
    answer: KnownCode


class Vocabulary:
    """The codes of a model, in the order of kinds and codes."""

    def __init__(self, vocabularies: Mapping[str, Sequence[str]], names: Names) -> None:
        """Prepares the search.

        Args:
            vocabularies: kind → codes.
            names: see Names.
        """
        self._entries: list[_Entry] = []
        for kind in _KINDS:
            for full in sorted(vocabularies.get(kind, ())):
                system, _, code = full.partition(":")
                name = names.get(kind, {}).get(full)
                words = tuple((name or "").casefold().split())
                answer = KnownCode(kind, system, code, name)
                self._entries.append(_Entry(code.casefold(), full.casefold(), words, answer))

    def search(self, query: str, kind: Kind | None, limit: int) -> list[KnownCode]:
        """Finds codes: first the one that is asked for, then those that begin so, then by name.

        Args:
            query: the beginning of a code, with its system or without, dots and case not mattering;
                or words, each of which begins a word of the name. Empty: every code.
            kind: of the codes; None: all kinds.
            limit: of codes given.
        """
        start = "".join(query.replace(".", "").split()).casefold()
        asked = query.casefold().split()
        found: list[tuple[int, KnownCode]] = []
        for entry in self._entries:
            if kind is not None and entry.answer.kind != kind:
                continue
            if start in (entry.code, entry.full):
                found.append((0, entry.answer))
            elif entry.code.startswith(start) or entry.full.startswith(start):
                found.append((1, entry.answer))
            elif asked and all(any(w.startswith(a) for w in entry.words) for a in asked):
                found.append((2, entry.answer))
        found.sort(key=lambda one: one[0])  # stable: within each in the order of the vocabulary
        return [answer for _, answer in found[:limit]]
