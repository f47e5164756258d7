"""From files to batches: sources and their errors, what has a loss, packing, the token file, the order of batches."""

from __future__ import annotations

import json
import math
import os
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memopt.errors import BadInput, StoreError
from memopt.jobs.chat import encode_chat
from memopt.jobs.data import BatchOrder, TokenDataset, prepare
from memopt.jobs.data_sources import PIECE_CHARS, Chat, Pair, Record, Text, read_records, source_bytes, split_stream
from memopt.jobs.packing import IGNORED_LABEL, PAD, START, Piece, labels, pack, positions
from memopt.jobs.token_file import TokenFile, write_token_file
from memopt.jobs.tokenizing import Encoder, load_tokenizer
from tests.data_helpers import CHATML, LAST_IS_DIFFERENT, MARKED, tiny_tokenizer, write_jsonl

TURNS = [
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "yes, one"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "and two"},
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


# --- sources


def test_a_directory_is_read_in_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.txt").write_text("bx")
    (tmp_path / "a.txt").write_bytes("\ufeffa\r\nä".encode())
    (tmp_path / "notes.md").write_text("not data")
    (tmp_path / ".hidden.txt").write_text("hidden")
    write_jsonl(tmp_path / "c.jsonl", [{"text": "c1"}, {"prompt": "p", "completion": "q"}, {"messages": TURNS[:2]}])
    read: list[int] = []
    records = list(read_records(tmp_path, read.append))
    assert [type(each) for each in records] == [Text, Text, Text, Pair, Chat]
    assert records[0] == Text(str(tmp_path / "a.txt"), "a\r\nä")
    assert records[1] == Text(str(tmp_path / "b" / "x.txt"), "bx")
    assert records[3] == Pair(f"{tmp_path / 'c.jsonl'}:2", "p", "q")
    assert sum(read) == source_bytes(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "ok"}\n\n{"txt": "no"}\n', r"a\.jsonl:3: no `text` \(the record has: txt\)"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": \n', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", b'{"text": 3}\n', r"a\.jsonl:1: `text` must be text, not int"),
        ("a.jsonl", b"[1]\n", r"a\.jsonl:1: a record is an object"),
        ("a.jsonl", b'{"prompt": "x"}\n', r"a\.jsonl:1: no `completion`"),
        ("a.jsonl", b'{"messages": "hello"}\n', r"a\.jsonl:1: `messages` must be a list"),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}\n', r"a\.jsonl:1: turn 1 of `messages`"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": "x"}]}\n', r"a\.jsonl:1: .*no turn of the assistant"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": "\xff"}\n', r"a\.jsonl:2: not UTF-8"),
        ("a.txt", b"one\ntwo\n\xffthree", r"a\.txt:3: not UTF-8"),
        ("a.txt", b"one\n" * 20000 + b"\xc3", r"a\.txt:20001: not UTF-8"),
        ("a.csv", b"one", r"a\.csv: unknown kind of file '\.csv'"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": "a\\ud800"}\n', r"a\.jsonl:2: `text` holds half of a surrogate pair"),
        ("a.jsonl", b'{"text": "ok"}\n' + b"[" * 99999, r"a\.jsonl:2: not JSON \(maximum recursion"),
        ("a.jsonl", b'{"text": null, "label": 1}\n', r"a\.jsonl:1: no `text` \(the record has: label\)"),
    ],
)
def test_bad_files_name_file_and_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=message):
        list(read_records(tmp_path / name))


def test_suffixes_may_be_large(tmp_path: Path) -> None:
    (tmp_path / "A.TXT").write_text("one")
    write_jsonl(tmp_path / "B.JSONL", [{"text": "two"}])
    for source in (tmp_path, tmp_path / "A.TXT"):
        assert next(read_records(source)) == Text(str(tmp_path / "A.TXT"), "one")
    assert [each.text for each in read_records(tmp_path) if isinstance(each, Text)] == ["one", "two"]


def test_what_is_no_file_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").symlink_to(tmp_path / "gone")
    with pytest.raises(BadInput, match=r"b\.txt: a link to nothing"):
        list(read_records(tmp_path))
    (tmp_path / "b.txt").unlink()
    os.mkfifo(tmp_path / "pipe.jsonl")
    for source in (tmp_path, tmp_path / "pipe.jsonl"):
        with pytest.raises(BadInput, match=r"pipe\.jsonl: .*no regular file"):
            list(read_records(source))
    (tmp_path / "pipe.jsonl").unlink()

    def walk(top: Path, onerror: Any) -> Any:  # permissions do not stop a superuser
        yield str(top), ["closed"], ["a.txt"]
        onerror(PermissionError(13, "Permission denied", str(top / "closed")))

    monkeypatch.setattr(os, "walk", walk)
    with pytest.raises(BadInput, match=r"closed: cannot be read \(Permission denied\)"):
        list(read_records(tmp_path))


def test_missing_sources(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="holds no .txt or .jsonl"):
        list(read_records(tmp_path))
    with pytest.raises(BadInput, match="no such file or directory"):
        list(read_records(tmp_path / "none.txt"))
    with pytest.raises(BadInput, match="no such file or directory"):
        list(read_records("./none"))


def test_a_datasets_name_is_loaded_only_then(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(*args: str, **kwargs: str) -> list[dict[str, str]]:
        asked.append((args, kwargs))
        if args[0] == "gone":
            raise FileNotFoundError("no such data set\nlong story")
        return [{"text": "a"}, {"label": "b"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    rows = read_records("org/name:small:test")
    assert next(rows) == Text("org/name:small:test row 0", "a")
    with pytest.raises(BadInput, match=r"row 1: no `text`"):
        next(rows)
    next(read_records("name"))
    assert asked == [(("org/name", "small"), {"split": "test"}), (("name",), {"split": "train"})]
    with pytest.raises(BadInput, match=r"'gone': neither a file .*\(no such data set\)"):
        list(read_records("gone"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BadInput, match="pip install datasets"):
        list(read_records("name"))


def test_long_texts_come_in_pieces_that_tokenise_the_same(tmp_path: Path, tokenizer: Any) -> None:
    text = Path(__file__).read_text() * 12
    assert len(text) > 4 * PIECE_CHARS
    (tmp_path / "long.txt").write_text(text)
    write_jsonl(tmp_path / "long.jsonl", [{"text": text}])
    whole = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    for name in ("long.txt", "long.jsonl"):
        records = list(read_records(tmp_path / name))
        assert len(records) > 2 and all(isinstance(each, Text) for each in records)
        pieces = list(Encoder(tokenizer).encode(records))
        assert np.concatenate([each.ids for each in pieces]).tolist() == [*whole, tokenizer.eos_token_id]
        assert [each.first for each in pieces] == [True] + [False] * (len(pieces) - 1)


@given(st.lists(st.text("a \nä", max_size=12), max_size=8), st.integers(1, 5))
def test_pieces_are_the_text(chunks: list[str], size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("memopt.jobs.data_sources.PIECE_CHARS", size)
        pieces = list(split_stream(chunks))
    assert "".join(pieces) == "".join(chunks)
    assert all(0 < len(each) <= 2 * size for each in pieces)


# --- what has a loss


def decoded_loss(tokenizer: Any, piece: Piece) -> str:
    return str(tokenizer.decode(piece.ids[piece.loss]))


def test_documents_end_with_eos_and_begin_as_the_tokenizer_says(tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    plain = list(Encoder(tokenizer).encode([Text("a", "ab"), Text("b", ""), Text("c", "cd")]))
    assert [tokenizer.decode(each.ids) for each in plain] == ["ab<eos>", "cd<eos>"]
    with_bos = tiny_tokenizer(bos_token="<bos>")
    with_bos.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    records: list[Record] = [Text("a", "ab"), Pair("b", "cd", "ef")]
    assert [with_bos.decode(each.ids) for each in Encoder(with_bos).encode(records)] == [
        "<bos>ab<eos>",
        "<bos>cdef<eos>",
    ]


def test_a_pair_learns_its_completion_and_the_end(tokenizer: Any) -> None:
    encoder = Encoder(tokenizer)
    for prompt, completion in [("Q: x\nA:", " yes"), ("", "all"), ("retu", "rn x"), ("p", "")]:
        (piece,) = encoder.encode([Pair("here", prompt, completion)])
        assert tokenizer.decode(piece.ids) == f"{prompt}{completion}<eos>"
        assert decoded_loss(tokenizer, piece) == f"{completion}<eos>"


@pytest.mark.parametrize(
    ("template", "learnt"),
    [
        (CHATML, "yes, one<eos>\nand two<eos>\n"),
        (MARKED, "yes, one<eos>and two<eos>"),
        (LAST_IS_DIFFERENT, "yes, one<eos>\n<think></think>and two<eos>\n"),
    ],
)
def test_a_chat_learns_what_the_assistant_says(template: str, learnt: str) -> None:
    tokenizer = tiny_tokenizer(template)
    (piece,) = Encoder(tokenizer).encode([Chat("here", tuple(TURNS))])
    assert decoded_loss(tokenizer, piece) == learnt
    assert tokenizer.decode(piece.ids) == tokenizer.apply_chat_template(TURNS, tokenize=False)


def test_a_chat_without_an_end_gets_one() -> None:
    tokenizer = tiny_tokenizer("{% for m in messages %}{{ m['role'] }}:{{ m['content'] }};{% endfor %}")
    (piece,) = Encoder(tokenizer).encode([Chat("here", tuple(TURNS[:3]))])
    assert tokenizer.decode(piece.ids).endswith("user:two?;<eos>")
    assert decoded_loss(tokenizer, piece) == "assistant:yes, one;"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "f:7: the tokenizer has no chat template"),
        ("{{ raise_exception('roles must alternate') }}", r"f:7: the chat template refuses .*roles must alternate"),
        ("{{ messages | length }}{{ messages[0]['content'] }}", "f:7: the chat template cannot be followed"),
        ("{# {% generation %} #}{{ messages[0]['content'] }}", "f:7: the chat template leaves nothing"),
    ],
)
def test_chat_templates_that_do_not_serve(template: str | None, message: str) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        encode_chat(tiny_tokenizer(template), Chat("f:7", tuple(TURNS)))
    assert "\n" not in str(caught.value)


# --- packing


@settings(max_examples=200, deadline=None)
@given(
    documents=st.lists(
        st.lists(st.lists(st.tuples(st.integers(0, 99), st.booleans()), max_size=7), min_size=1, max_size=3)
    ),
    seq_len=st.integers(2, 9),
)
def test_packing_keeps_every_token_once_in_order(documents: list[list[list[tuple[int, bool]]]], seq_len: int) -> None:
    pieces = [
        Piece.of([t for t, _ in part], np.array([x for _, x in part], dtype=bool), first=at == 0)
        for parts in documents
        for at, part in enumerate(parts)
    ]
    sequences = list(pack(pieces, seq_len, pad_id=7))
    # the obvious way: one list of (token, label, position in its document)
    expected: list[tuple[int, int, int]] = []
    for parts in documents:
        document = [each for part in parts for each in part]
        for at, (token, learn) in enumerate(document):
            expected.append((token, token if learn and at else IGNORED_LABEL, at))
    n_real = len(expected)
    assert len(sequences) == math.ceil(n_real / seq_len)
    if not sequences:
        return
    tokens, flags = (np.stack(each) for each in zip(*sequences, strict=True))
    assert tokens.dtype == np.int32 and tokens.shape == flags.shape == (len(sequences), seq_len)
    assert tokens.ravel()[:n_real].tolist() == [token for token, _, _ in expected]
    assert labels(tokens, flags).ravel()[:n_real].tolist() == [label for _, label, _ in expected]
    got = positions(flags).ravel()
    start = 0
    for at, (_, _, position) in enumerate(expected):
        if position == 0 or at % seq_len == 0:
            start = at
        assert got[at] == at - start
    padding = len(sequences) * seq_len - n_real
    assert padding < seq_len
    assert (tokens.ravel()[n_real:] == 7).all() and (labels(tokens, flags).ravel()[n_real:] == IGNORED_LABEL).all()
    assert got[n_real:].tolist() == list(range(padding))
    assert int((flags & PAD > 0).sum()) == padding


def test_documents_do_not_see_each_other() -> None:
    """The positions are what transformers goes by: a packed document has the logits it has alone."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    ).eval()
    documents = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
    ((tokens, flags),) = pack([Piece.of(each, True) for each in documents], 12, 0)
    with torch.no_grad():
        packed = model(
            input_ids=torch.from_numpy(tokens.astype(np.int64))[None],
            position_ids=torch.from_numpy(positions(flags))[None],
            use_cache=False,
        ).logits[0]
        alone = torch.cat([model(input_ids=torch.tensor([each])).logits[0] for each in documents])
    torch.testing.assert_close(packed[:9], alone, atol=1e-5, rtol=1e-5)


# --- the token file


def make(tmp_path: Path, tokenizer: Any, rows: list[object], seq_len: int = 8) -> TokenDataset:
    source = write_jsonl(tmp_path / "d.jsonl", rows)
    return prepare(str(source), tokenizer, seq_len=seq_len, vocab_size=300, path=tmp_path / "tokens")


def test_a_dataset_gives_batches(tmp_path: Path, tokenizer: Any) -> None:
    dataset = make(tmp_path, tokenizer, [{"text": "hello world"}, {"prompt": "say", "completion": " it"}])
    everything = dataset.micro_batch(range(len(dataset)))
    assert {name: (tensor.shape, str(tensor.dtype)) for name, tensor in everything.items()} == {
        name: ((len(dataset), 8), "torch.int64") for name in ("input_ids", "labels", "position_ids")
    }
    counts = dataset.counts
    real = everything["input_ids"].ravel()[: counts["tokens"]]
    assert tokenizer.decode(real) == "hello world<eos>say it<eos>"
    assert counts["documents"] == 2 and counts["tokens"] + counts["padding"] == 8 * len(dataset)
    learnt = everything["labels"][:, 1:] != IGNORED_LABEL
    assert int(learnt.sum()) == counts["target_tokens"] == dataset.target_tokens(range(len(dataset)))
    assert everything["labels"][0, 0] == IGNORED_LABEL
    last = dataset.micro_batch([len(dataset) - 1])
    assert last["input_ids"].tolist() == everything["input_ids"][-1:].tolist()
    with pytest.raises(IndexError):
        dataset.micro_batch([len(dataset)])
    dataset.close()
    dataset.close()


def test_the_file_is_reused_only_for_the_same_data(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "tokens"
    first = make(tmp_path, tokenizer, [{"text": "hello"}])
    made = path.stat().st_ino
    same = prepare(str(tmp_path / "d.jsonl"), tokenizer, seq_len=8, vocab_size=300, path=path)
    assert path.stat().st_ino == made and same.content_hash == first.content_hash
    longer = prepare(str(tmp_path / "d.jsonl"), tokenizer, seq_len=9, vocab_size=300, path=path)
    assert path.stat().st_ino != made and longer.content_hash != first.content_hash
    other = make(tmp_path, tokenizer, [{"text": "hello you"}])
    assert other.content_hash != first.content_hash
    path.write_bytes(path.read_bytes()[:-1])
    assert make(tmp_path, tokenizer, [{"text": "hello"}]).content_hash == first.content_hash


@pytest.mark.parametrize(
    ("rows", "vocab_size", "message"),
    [
        ([], 300, "holds no text at all"),
        ([{"text": ""}], 300, "holds no text at all"),
        ([{"text": "hello"}], 20, "the model's vocabulary has 20"),
        ([{"text": "fine"}, {"no": 1}], 300, "d.jsonl:2"),
    ],
)
def test_bad_data_leaves_nothing_behind(
    tmp_path: Path, tokenizer: Any, rows: list[object], vocab_size: int, message: str
) -> None:
    source = write_jsonl(tmp_path / "d.jsonl", rows)
    with pytest.raises(BadInput, match=message):
        prepare(str(source), tokenizer, seq_len=8, vocab_size=vocab_size, path=tmp_path / "tokens")
    assert [each.name for each in tmp_path.iterdir()] == ["d.jsonl"]


def test_nothing_to_predict(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no token has a predecessor"):
        make(tmp_path, tiny_tokenizer(eos_token=None), [{"text": "a"}, {"text": "b"}])


def test_damaged_files_are_told(tmp_path: Path, tokenizer: Any) -> None:
    dataset = make(tmp_path, tokenizer, [{"text": "hello world, how is it?"}])
    dataset.close()
    path = tmp_path / "tokens"
    TokenFile(path).verify()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreError, match="do not match their hash"):
        TokenFile(path).verify()
    path.write_bytes(content[:-1])
    with pytest.raises(StoreError, match="bytes where its header says"):
        TokenFile(path)
    path.write_bytes(b"something else")
    with pytest.raises(StoreError, match="not a token file"):
        TokenFile(path)
    with pytest.raises(StoreError, match="cannot be read"):
        TokenFile(tmp_path / "none")


def test_a_refused_write_is_told_and_leaves_the_old_file(tmp_path: Path) -> None:
    sequence = (np.zeros(4, np.int32), np.full(4, START, np.uint8))
    path = tmp_path / "tokens"
    write_token_file(path, [sequence], 4, {})
    before = path.read_bytes()

    def failing() -> Any:
        yield sequence
        raise OSError(28, "No space left on device")

    with pytest.raises(StoreError, match="No space left on device.*free some space"):
        write_token_file(path, failing(), 4, {})
    assert path.read_bytes() == before and [each.name for each in tmp_path.iterdir()] == ["tokens"]


def test_tokenizers_are_loaded_or_refused(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(BadInput, match="no usable tokenizer"):
        load_tokenizer(str(tmp_path))
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert load_tokenizer(str(tmp_path)).eos_token_id == tokenizer.eos_token_id


# --- the order of batches


@given(
    n=st.integers(1, 40), batch=st.integers(1, 5), accum=st.integers(1, 4), seed=st.none() | st.integers(0, 2**63 - 1)
)
def test_an_epoch_visits_every_sequence_once(n: int, batch: int, accum: int, seed: int | None) -> None:
    order = BatchOrder(n_sequences=n, batch_size=batch, grad_accum=accum, seed=seed, epochs=2)
    micros = math.ceil(n / batch)
    assert order.steps_per_epoch == math.ceil(micros / accum)
    assert order.total_steps == 2 * order.steps_per_epoch
    for epoch in (0, 1):
        steps = [order.indices(epoch * order.steps_per_epoch + k) for k in range(order.steps_per_epoch)]
        assert sorted(i for step in steps for micro in step for i in micro) == list(range(n))
        assert all(len(step) == accum for step in steps[:-1]) and sum(map(len, steps)) == micros
        assert [order.indices(epoch * order.steps_per_epoch + k) for k in range(order.steps_per_epoch)] == steps


def test_epochs_differ_and_steps_are_counted() -> None:
    order = BatchOrder(n_sequences=30, batch_size=30, seed=1, epochs=2.5)
    assert order.indices(0) != order.indices(1) and order.total_steps == 3
    assert BatchOrder(n_sequences=30, seed=1, max_steps=7).total_steps == 7
    assert BatchOrder(n_sequences=30, batch_size=30, seed=2).indices(0) != order.indices(0)
    assert BatchOrder(n_sequences=3, batch_size=2, seed=None).indices(1) == [[2]]
    expected = np.random.default_rng([1, 1]).permutation(np.arange(30, dtype=np.int32))
    assert order.indices(1) == [expected.tolist()]
    with pytest.raises(BadInput, match="n_sequences = 0"):
        BatchOrder(n_sequences=0)
