"""Where training text comes from: files, directories and `datasets` names, read as a stream of records.

Nothing here holds more than one record (or one 16 Ki-character piece of a long text) in memory, and no module of a
framework is imported unless a `datasets` name asks for it.
"""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memopt.errors import BadInput

SUFFIXES = (".txt", ".jsonl")
PIECE_CHARS = 8 * 1024
_READ_BYTES = 64 * 1024
_FIELDS = "`text`, `prompt` and `completion`, or `messages`"

OnBytes = Callable[[int], None]


@dataclass(frozen=True)
class Text:
    """A document, or one piece of a long one: `first` and `last` say whether it begins and ends here."""

    where: str
    text: str
    first: bool = True
    last: bool = True


@dataclass(frozen=True)
class Pair:
    """A prompt and the completion to learn."""

    where: str
    prompt: str
    completion: str


@dataclass(frozen=True)
class Chat:
    """A conversation: `role` and `content` of each turn; what the assistant said is to be learnt."""

    where: str
    messages: tuple[Mapping[str, Any], ...]


Record = Text | Pair | Chat


def read_records(source: str | os.PathLike[str], on_bytes: OnBytes | None = None) -> Iterator[Record]:
    """Records of `source`, in a fixed order: a .txt file (one document), a .jsonl file (one record per line),
    a directory of them (recursive, sorted by path), or a `datasets` name: `name`, `name:split`, `name:config:split`.

    `on_bytes` is told how many bytes of the files were read. Raises BadInput that names file and line.
    """
    count = on_bytes or (lambda nbytes: None)
    files = source_files(source)
    if files is None:
        yield from _read_dataset(os.fspath(source))
        return
    for path in files:
        yield from (_read_txt if path.suffix.lower() == ".txt" else _read_jsonl)(path, count)


def source_files(source: str | os.PathLike[str]) -> list[Path] | None:
    """The files `source` stands for, or None when it is a `datasets` name. Raises BadInput when there are none."""
    path = Path(source)
    if path.is_dir():
        found = [
            Path(folder, name)
            for folder, _, names in os.walk(path, onerror=_refuse_unreadable)
            for name in names
            if name.lower().endswith(SUFFIXES) and not name.startswith(".")
        ]
        for file in found:
            if not file.is_file():
                raise BadInput(f"data {file}: a link to nothing, or no regular file; remove it or move it elsewhere")
        if not found:
            raise BadInput(f"data {path}: the directory holds no .txt or .jsonl file; put some there")
        return sorted(found, key=lambda each: each.relative_to(path).parts)
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise BadInput(f"data {path}: unknown kind of file {path.suffix!r}; give .txt or .jsonl")
        return [path]
    if path.exists():
        raise BadInput(f"data {path}: no regular file, which it must be to be read twice; write it to one first")
    text = os.fspath(source)
    if path.suffix.lower() in SUFFIXES or path.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1:
        raise BadInput(f"data {path}: no such file or directory; check the path")
    return None


def source_bytes(source: str | os.PathLike[str]) -> int | None:
    """Bytes of the files of `source`, or None when it is a `datasets` name."""
    files = source_files(source)
    return None if files is None else sum(path.stat().st_size for path in files)


def record_from(row: object, where: str) -> Iterator[Record]:
    """The record(s) of one JSON object or `datasets` row; a long text comes as several pieces.

    Raises BadInput, beginning with `where`, on a missing field or one of the wrong type.
    """
    if not isinstance(row, Mapping):
        raise BadInput(f"{where}: a record is an object with {_FIELDS}, not {type(row).__name__}")
    if row.get("messages") is not None:
        yield Chat(where, _messages(row["messages"], where))
    elif row.get("prompt") is not None or row.get("completion") is not None:
        yield Pair(where, _text(row, "prompt", where), _text(row, "completion", where))
    else:
        text = _text(row, "text", where)
        yield from _document(where, (text[at : at + PIECE_CHARS] for at in range(0, len(text), PIECE_CHARS)))


def split_stream(chunks: Iterable[str]) -> Iterator[str]:
    """The same text in pieces of at most 16 Ki characters, cut where a tokenizer would cut too.

    Byte-level BPE (GPT-2's and Llama 3's pre-tokenizers) gives the same tokens as for the whole; tokenizers that put a
    blank before each text (SentencePiece style) see one more blank per piece.
    """
    buffer = ""
    for chunk in chunks:
        buffer += chunk
        while len(buffer) > 2 * PIECE_CHARS:
            at = _cut(buffer, 2 * PIECE_CHARS)
            yield buffer[:at]
            buffer = buffer[at:]
    if buffer:
        yield buffer


def _cut(text: str, end: int) -> int:
    """After a lone line end, else before a run of blanks, else (no blank for 16 Ki characters) anywhere."""
    for mark, offset in (("\n", 1), (" ", 0)):
        at = text.rfind(mark, 1, end - 1)
        while at > 0:
            if not text[at - 1].isspace() and (mark == " " or not text[at + 1].isspace()):
                return at + offset
            at = text.rfind(mark, 1, at)
    return end


def _document(where: str, chunks: Iterable[str]) -> Iterator[Text]:
    held: str | None = None
    first = True
    for piece in split_stream(chunks):
        if held is not None:
            yield Text(where, held, first, last=False)
            first = False
        held = piece
    yield Text(where, held or "", first)


def _text(row: Mapping[str, Any], name: str, where: str) -> str:
    value = row.get(name)
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise BadInput(
                f"{where}: `{name}` holds half of a surrogate pair (character {error.start}), which is no text; mend it"
            ) from None
        return value
    if value is None:
        has = ", ".join(sorted(str(each) for each in row if row[each] is not None)) or "nothing"
        raise BadInput(f"{where}: no `{name}` (the record has: {has}); give {_FIELDS}")
    raise BadInput(f"{where}: `{name}` must be text, not {type(value).__name__}")


def _messages(value: object, where: str) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(value, (list, tuple)) or not value:
        raise BadInput(f"{where}: `messages` must be a list of turns with `role` and `content`")
    for at, turn in enumerate(value):
        if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str) or "content" not in turn:
            raise BadInput(f"{where}: turn {at + 1} of `messages` must be an object with `role` and `content`")
    if not any(turn["role"] == "assistant" for turn in value):
        raise BadInput(f"{where}: `messages` holds no turn of the assistant, so there is nothing to learn; remove it")
    return tuple(value)


def _refuse_unreadable(error: OSError) -> None:
    # a folder left out in silence would be training on something else than was asked for
    raise BadInput(f"data {error.filename}: cannot be read ({error.strerror}); check its permissions")


def _open(path: Path) -> Any:
    try:
        return open(path, "rb")
    except OSError as error:
        raise BadInput(f"data {path}: cannot be read ({error.strerror}); check the path and its permissions") from None


def _read_txt(path: Path, on_bytes: OnBytes) -> Iterator[Record]:
    def chunks() -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        line = 1
        with _open(path) as file:
            while True:
                raw = file.read(_READ_BYTES)
                try:
                    text = decoder.decode(raw, final=not raw)
                except UnicodeDecodeError as error:
                    line += error.object[: error.start].count(b"\n")
                    raise BadInput(f"{path}:{line}: not UTF-8 ({error.reason}); convert the file to UTF-8") from None
                if text:
                    yield text
                if not raw:
                    return
                line += text.count("\n")
                on_bytes(len(raw))

    yield from _document(str(path), chunks())


def _read_jsonl(path: Path, on_bytes: OnBytes) -> Iterator[Record]:
    with _open(path) as file:
        for number, raw in enumerate(file, start=1):
            on_bytes(len(raw))
            where = f"{path}:{number}"
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise BadInput(f"{where}: not UTF-8 ({error.reason}); convert the file to UTF-8") from None
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise BadInput(f"{where}: not JSON ({error}); each line must be one JSON object") from None
            yield from record_from(row, where)


def _read_dataset(name: str) -> Iterator[Record]:
    # imported here alone: it costs about 100 MiB
    try:
        import datasets  # type: ignore[import-untyped,unused-ignore]
    except ImportError:
        raise BadInput(
            f"data {name!r}: no such file or directory, and the `datasets` library for names on the hub is not "
            "installed; check the path, or pip install datasets"
        ) from None
    repository, *rest = name.split(":")
    split = rest[-1] if rest else "train"
    try:
        rows = datasets.load_dataset(repository, *rest[:-1], split=split)
    except Exception as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadInput(
            f"data {name!r}: neither a file or directory here nor a data set that loads ({first_line}); "
            "check the path, or give name, name:split or name:config:split"
        ) from None
    for number, row in enumerate(rows):
        yield from record_from(row, f"{name} row {number}")
