"""Sources of tokens: a text, documents of a table, conversations of a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

from sleb.errors import ConfigError, RequestError
from sleb.pruning.calibration.chats import as_messages
from sleb.pruning.calibration.downloads import c4_beginning, c4_shard, wikitext2_lines
from sleb.pruning.calibration.samplers import first_tokens, pick_rows, sample_rows, text_rows
from sleb.pruning.calibration.spec import SourceSpec
from sleb.pruning.calibration.tables import read_column, read_text

Encode = Callable[[str], Sequence[int]]
# Messages with role and content to the tokens of the conversation.
Render = Callable[[Sequence[Mapping[str, Any]]], Sequence[int]]

_SEPARATOR = "\n\n"


class Source(Protocol):
    """What a sampler asks for."""

    def packed(self, num_tokens: int) -> Sequence[int]:
        """Tokens from the first on: `num_tokens` or more, or all that there are."""
        ...

    def rows(self, seed: int) -> Sequence[int]:
        """Tokens of the first rows in shuffled order."""
        ...


def open_source(spec: SourceSpec, encode: Encode, render: Render | None) -> Source:
    """The data set or file of `spec`. Raises ConfigError for a file that cannot be read."""
    if spec.name == "wikitext2":
        return _Wikitext2(encode)
    if spec.name == "c4":
        return _C4(encode)
    path = Path(spec.name)
    if spec.column is None:
        return _TextFile(path, encode)
    first = next(read_column(path, spec.column), None)
    if first is not None and isinstance(first[1], list):
        if render is None:
            raise ConfigError(
                f"calibration {first[0]} holds a conversation, but the model has no chat template: "
                "name a column of text, or add a chat template to the model's tokenizer_config.json"
            )
        return _Conversations(path, spec.column, render)
    return _Documents(path, spec.column, encode)


@dataclass(frozen=True)
class _Wikitext2:
    encode: Encode

    def packed(self, num_tokens: int) -> Sequence[int]:
        return self.encode(_SEPARATOR.join(wikitext2_lines()))

    def rows(self, seed: int) -> Sequence[int]:
        return self.encode(sample_rows(wikitext2_lines(), seed, _SEPARATOR))


@dataclass(frozen=True)
class _C4:
    """Documents joined by a space, as the authors do."""

    encode: Encode

    def packed(self, num_tokens: int) -> Sequence[int]:
        return self.encode(" ".join(c4_beginning()))

    def rows(self, seed: int) -> Sequence[int]:
        return self.encode(sample_rows(c4_shard(), seed, " "))


@dataclass(frozen=True)
class _TextFile:
    path: Path
    encode: Encode

    def packed(self, num_tokens: int) -> Sequence[int]:
        return self.encode(self._text)

    def rows(self, seed: int) -> Sequence[int]:
        return self.encode(sample_rows(text_rows(self._text), seed, _SEPARATOR))

    @cached_property
    def _text(self) -> str:
        return read_text(self.path)


@dataclass(frozen=True)
class _Documents:
    """Rows of text, joined as WikiText's are."""

    path: Path
    column: str
    encode: Encode

    def packed(self, num_tokens: int) -> Sequence[int]:
        return first_tokens(self._read(), self.encode, _SEPARATOR, num_tokens)

    def rows(self, seed: int) -> Sequence[int]:
        return self.encode(_SEPARATOR.join(pick_rows(self._read, seed)))

    def _read(self) -> Iterator[str]:
        for where, value in read_column(self.path, self.column):
            if not isinstance(value, str):
                raise _wrong_type(where, self.column, value, "text")
            yield value


@dataclass(frozen=True)
class _Conversations:
    """Rows of messages: each conversation by the model's template, one after the other."""

    path: Path
    column: str
    render: Render

    def packed(self, num_tokens: int) -> Sequence[int]:
        token_ids: list[int] = []
        for row in self._read():
            token_ids.extend(self._tokens(row))
            if len(token_ids) >= num_tokens:
                break
        return token_ids

    def rows(self, seed: int) -> Sequence[int]:
        return list(chain.from_iterable(map(self._tokens, pick_rows(self._read, seed))))

    def _read(self) -> Iterator[tuple[str, list[Any]]]:
        for where, value in read_column(self.path, self.column):
            if not isinstance(value, list):
                raise _wrong_type(where, self.column, value, "a list of messages, as in the first row")
            yield where, value

    def _tokens(self, row: tuple[str, list[Any]]) -> Sequence[int]:
        where, value = row
        try:
            return self.render(as_messages(value, where))
        except RequestError as error:
            raise ConfigError(f"calibration {where}: {error}") from None


def _wrong_type(where: str, column: str, value: Any, wanted: str) -> ConfigError:
    kind = "null" if value is None else type(value).__name__
    return ConfigError(
        f"calibration {where} has {kind} in column {column!r}; it must be {wanted}: mend or remove that row"
    )
