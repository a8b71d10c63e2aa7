"""Corpora: what is in them, how they split, and that a batch depends on nothing but its arguments."""

from __future__ import annotations

import math
import sys
import types

import numpy as np
import pytest

from coga.data import batches, contexts, load_corpus, unigram_entropy


@pytest.fixture(scope="module")
def python():
    return load_corpus("python", length=4096)


@pytest.fixture
def folder(tmp_path):
    """Forty files whose bytes name the file, of 100 to 139 bytes."""
    for i in range(40):
        (tmp_path / f"{i:02d}.txt").write_bytes(bytes([i]) * (100 + i))
    return tmp_path


def test_python_is_whole_packages_without_tests(python):
    names = python.train.names + python.validation.names
    assert len(set(names)) == len(names)
    assert "asyncio" in names
    assert not {"test", "tests", "site-packages", "dist-packages", "__pycache__"} & set(names)
    for stream in (python.train, python.validation):
        assert list(stream.names) == sorted(stream.names)
        assert stream.start[0] == 0
        assert stream.start[-1] == len(stream) == stream.bytes
    share = python.validation.bytes / (python.train.bytes + python.validation.bytes)
    assert 0.05 <= share <= 0.1
    assert python.version == ".".join(map(str, sys.version_info[:3]))


def test_python_holds_no_test_files_of_its_packages(python, monkeypatch, tmp_path):
    (tmp_path / "alpha" / "tests").mkdir(parents=True)
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "alpha" / "tests" / "a.py").write_text("secret")
    (tmp_path / "alpha" / "__init__.py").write_text("alpha = 1\n" * 20)
    (tmp_path / "site-packages" / "b.py").write_text("secret")
    (tmp_path / "_sysconfigdata_x-y.py").write_text("secret")
    (tmp_path / "beta.py").write_text("beta = 2\n" * 20)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    corpus = load_corpus("python", length=8)
    text = bytes(corpus.train.tokens) + bytes(corpus.validation.tokens)
    assert b"secret" not in text
    assert text.count(b"alpha = 1") + text.count(b"beta = 2") == 40


def test_the_hash_names_the_text_and_the_split(folder):
    first = load_corpus(folder, length=10)
    assert load_corpus(folder, length=10).sha256 == first.sha256
    (folder / "07.txt").write_bytes(b"x" * 107)
    assert load_corpus(folder, length=10).sha256 != first.sha256


def test_a_folder_splits_by_whole_files(folder):
    corpus = load_corpus(folder, length=10)
    train, held_out = set(corpus.train.tokens.tolist()), set(corpus.validation.tokens.tolist())
    assert train.isdisjoint(held_out)
    assert len(train | held_out) == 40
    assert np.all(np.diff(corpus.train.tokens.astype(int)) >= 0), "files in sorted order"


def test_a_long_context_takes_more_files_and_keeps_the_first_ones(folder):
    few, many = load_corpus(folder, length=10), load_corpus(folder, length=900)
    assert set(few.validation.names) < set(many.validation.names)
    assert len(many.validation) > 900


def test_a_folder_of_one_file_is_split_like_a_file(tmp_path):
    (tmp_path / "one.txt").write_bytes(bytes(range(250)) * 4)
    corpus = load_corpus(tmp_path, length=10)
    assert (len(corpus.train), len(corpus.validation)) == (950, 50)


def test_a_file_validates_on_its_end(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(bytes(range(250)) * 4)
    corpus = load_corpus(path, length=10)
    assert isinstance(corpus.train.tokens, np.memmap)
    assert bytes(corpus.train.tokens) + bytes(corpus.validation.tokens) == path.read_bytes()
    assert len(corpus.validation) == 50
    assert len(load_corpus(path, length=99).validation) == 100, "at least one context and its last target"


@pytest.mark.parametrize(
    ("size", "length", "rule"),
    [(0, 1, "must not be empty"), (50, 100, "must hold at least 202"), (201, 100, "must hold at least 202")],
)
def test_too_little_text(tmp_path, size, length, rule):
    path = tmp_path / "text"
    path.write_bytes(b"a" * size)
    with pytest.raises(ValueError, match=rule):
        load_corpus(path, length=length)
    path.write_bytes(b"a" * 202)
    assert len(load_corpus(path, length=100).train) == 101


def test_missing_or_empty_places(tmp_path):
    with pytest.raises(ValueError, match="existing file or folder"):
        load_corpus(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="at least one file that is not empty"):
        load_corpus(tmp_path)
    with pytest.raises(ValueError, match="length=0"):
        load_corpus("python", length=0)


def test_batches_are_a_pure_function(python):
    first = batches(python, 300, 3, seed=5, step=7)
    batches(python, 17, 1, seed=1, step=2)
    again = batches(python, 300, 3, seed=5, step=7)
    for x, y in zip(first, again):
        assert x.shape == (3, 300)
        assert x.equal(y)
    assert first[0][:, 1:].equal(first[1][:, :-1]), "targets are the next tokens"
    for other in (batches(python, 300, 3, seed=5, step=8), batches(python, 300, 3, seed=6, step=7)):
        assert not other[0].equal(first[0])
    assert not first[0][0].equal(first[0][1])


def test_a_context_stays_in_one_document_where_that_is_long_enough(folder):
    corpus = load_corpus(folder, length=10)
    seen = set()
    for step in range(200):
        tokens, targets = batches(corpus, 50, 2, seed=0, step=step)
        assert (tokens == tokens[:, :1]).all()
        assert (targets == tokens[:, :1]).all()
        seen |= set(tokens[:, 0].tolist())
    assert seen == set(corpus.train.tokens.tolist()), "every document is drawn"


def test_a_context_longer_than_every_document_still_fits(folder):
    corpus = load_corpus(folder, length=10)
    length = len(corpus.train) - 1
    tokens, targets = batches(corpus, length, 1, seed=0, step=0)
    assert tokens[0].tolist() == corpus.train.tokens[:-1].tolist()
    assert targets[0, -1] == corpus.train.tokens[-1]
    with pytest.raises(ValueError, match="length"):
        batches(corpus, length + 1, 1, seed=0, step=0)
    with pytest.raises(ValueError, match="batch=0"):
        batches(corpus, 10, 0, seed=0, step=0)


def test_contexts_are_fixed_and_held_out(folder):
    corpus = load_corpus(folder, length=10)
    tokens, _ = contexts(corpus, 100, 5)
    assert tokens.equal(contexts(corpus, 100, 5)[0])
    assert set(tokens.flatten().tolist()) <= set(corpus.validation.tokens.tolist())
    assert tokens[:1].equal(contexts(corpus, 100, 1)[0])


def test_unigram_entropy():
    assert unigram_entropy(b"aaaa") == 0
    assert unigram_entropy(bytes(range(256)) * 3) == pytest.approx(8)
    expected = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))
    assert unigram_entropy(np.array([1, 1, 1, 9], dtype=np.uint8)) == pytest.approx(expected)
    for bad in (b"", np.array([1, 2])):
        with pytest.raises(ValueError, match="must be bytes"):
            unigram_entropy(bad)


class _Words:
    """Stands in for the optional library: a token a character, by code point."""

    @staticmethod
    def from_file(path: str) -> _Words:
        return _Words()

    def encode(self, text: str):
        return types.SimpleNamespace(ids=[ord(c) for c in text])

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))

    def get_vocab_size(self) -> int:
        return 1000


def test_tokenizer_sets_vocabulary_and_bytes_per_token(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", types.SimpleNamespace(Tokenizer=_Words))
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "text").write_text("ä" * 1000)
    corpus = load_corpus(tmp_path / "text", length=10, tokenizer=str(tmp_path / "tokenizer.json"))
    assert corpus.vocab_size == 1000
    assert corpus.train.tokens.dtype == np.uint16
    assert (len(corpus.train), corpus.train.bytes) == (950, 1900)
    assert corpus.text(contexts(corpus, 10, 1)[0][0].tolist()) == "ä" * 10
    with pytest.raises(ValueError, match="must be an existing"):
        load_corpus(tmp_path / "text", tokenizer=str(tmp_path / "none.json"))


def test_tokenizer_without_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    (tmp_path / "text").write_text("a" * 100)
    with pytest.raises(ValueError, match="coga"):
        load_corpus(tmp_path / "text", tokenizer="tokenizer.json")


def test_bytes_as_text(folder):
    corpus = load_corpus(folder, length=10)
    assert corpus.text(list("é\n".encode())) == "é\n"
    assert corpus.text([97, 0xFF, 50000]) == "a��"
