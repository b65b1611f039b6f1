"""Search of the codes that a model knows: by how they begin, and by the words of their names."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence

from cafemed.names import Names
from serve.answers import Kind, KnownCode

_KINDS: tuple[Kind, ...] = ("diagnosis", "procedure", "medication", "laboratory")


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A code as it is searched.

    Attributes:
        starts: the code without its system and with it, each after a line's end, which no query
            has.
        words: of its name, each after a blank.
        answer: what is told of it.
    """

    starts: str
    words: str
    answer: KnownCode

    def is_called(self, code: str) -> bool:
        """Whether this is the code that a query spells out."""
        return f"\n{code}\n" in f"{self.starts}\n"


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
                starts = f"\n{code}\n{full}".casefold()
                answer = KnownCode(kind, system, code, name)
                self._entries.append(_Entry(starts, "".join(_words(name or "")), answer))

    def search(self, query: str, kind: Kind | None, limit: int) -> list[KnownCode]:
        """Finds codes: first the one that is asked for, then those that begin so, then by name.

        Args:
            query: the beginning of a code, with its system or without, dots and case not mattering;
                or words, each of which begins a word of the name. Empty: every code.
            kind: of the codes; None: all kinds.
            limit: of codes given.
        """
        code = "".join(query.replace(".", "").split()).casefold()
        start, asked = f"\n{code}", _telling(_words(query))
        exact: list[KnownCode] = []
        begin: list[KnownCode] = []
        named: list[KnownCode] = []
        for entry in self._entries:  # ten thousand: each is looked through as text, at once
            if kind is not None and entry.answer.kind != kind:
                continue
            if start in entry.starts:
                (exact if entry.is_called(code) else begin).append(entry.answer)
            elif (
                len(named) < limit
                and asked
                and asked[0] in entry.words
                and all(one in entry.words for one in asked)
            ):
                named.append(entry.answer)
        return [*exact, *begin, *named][:limit]


def _words(text: str) -> list[str]:
    return [f" {word}" for word in text.casefold().split()]


def _telling(words: Collection[str]) -> list[str]:
    """Words, the longest first, less those that begin another: where this is, those are."""
    told: list[str] = []
    for word in sorted(words, key=len, reverse=True):
        if not any(one.startswith(word) for one in told):
            told.append(word)
    return told
