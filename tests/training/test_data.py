"""Text to tokens to batches: the split, the cache, and batches shared by hosts."""

import functools
import glob
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from training import corpus, data

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("WSEKERN_CACHE", str(folder))
    return folder


@pytest.fixture
def texts(tmp_path):
    """Twenty different files, of 57 to 76 bytes."""
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    for i in range(20):
        where = folder / "deep" if i % 2 else folder
        (where / f"{i:02}.txt").write_text(f"file {i:02} " + "abc " * 12 + "é" + "." * i)
    return folder


def content(folder):
    return {path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_single_file_is_cut_at_its_end(tmp_path, cache):
    text = "".join(chr(97 + i % 26) for i in range(1000))
    (tmp_path / "one.txt").write_text(text)
    corpus = data.open_corpus(str(tmp_path / "one.txt"), context=8)
    assert bytes(corpus.train) == text[:900].encode()
    assert bytes(corpus.validation) == text[900:].encode()
    assert (corpus.vocab, corpus.name, corpus.alphabet) == (256, "one.txt", None)


def test_a_whole_file_belongs_to_one_part(texts, cache):
    corpus = data.open_corpus(str(texts), context=8, validation_fraction=0.2)
    sides = bytes(corpus.train), bytes(corpus.validation)
    for text in content(texts):
        assert (text in sides[0]) != (text in sides[1])
    assert len(sides[0]) + len(sides[1]) == sum(map(len, content(texts)))
    assert 0.1 < len(sides[1]) / (len(sides[0]) + len(sides[1])) <= 0.2


def test_of_two_files_each_part_gets_one(tmp_path, cache):
    (tmp_path / "long.txt").write_text("long" * 100)
    (tmp_path / "short.txt").write_text("short" * 10)
    corpus = data.open_corpus(str(tmp_path / "*.txt"), context=8)
    assert bytes(corpus.validation) == b"short" * 10
    assert bytes(corpus.train) == b"long" * 100


def test_equal_files_count_once(texts, cache):
    before = data.open_corpus(str(texts), context=8)
    for path in list(texts.rglob("*.txt")):
        path.with_name("z" + path.name).write_bytes(path.read_bytes())
    after = data.open_corpus(str(texts), context=8)
    assert after.fingerprint == before.fingerprint


def test_files_without_text_are_skipped_and_named(texts, cache):
    before = data.open_corpus(str(texts), context=8)
    (texts / "nul.bin").write_bytes(b"a\0b")
    (texts / "latin.txt").write_bytes("é".encode("latin-1"))
    (texts / "empty.txt").touch()
    (texts / ".hidden").write_text("not looked at")
    (texts / "broken").symlink_to(texts / "nowhere")
    after = data.open_corpus(str(texts), context=8)
    assert after.fingerprint == before.fingerprint
    reasons = ("cannot be read", "is empty", "is not UTF-8 text (byte 0 is 0xe9)", "is binary")
    assert len(after.skipped) == 4
    for reason, line in zip(reasons, after.skipped, strict=True):
        assert reason in line


def test_the_default_is_the_standard_library(cache):
    name, sources = corpus.find_sources(())
    names = {source.path.name for source in sources}
    assert name.startswith("standard library of Python")
    assert {"argparse.py", "dataclasses.py"} <= names
    assert not any("site-packages" in source.path.parts for source in sources)
    assert all(source.path.suffix == ".py" and not source.named for source in sources)
    assert sources == corpus.find_sources(())[1]


def test_characters_are_those_of_the_text_sorted(tmp_path, cache):
    (tmp_path / "text").write_text("beté alpha\n" * 20)
    corpus = data.open_corpus(str(tmp_path / "text"), tokens="characters", context=8)
    assert corpus.alphabet == "\n abehlpté" and corpus.vocab == 10
    tokens = corpus.encode("alphabet")
    assert tokens.dtype == np.int32 and tokens.tolist() == [2, 6, 7, 5, 2, 3, 4, 8]
    assert corpus.decode(tokens) == "alphabet"
    assert corpus.decode(corpus.train) == ("beté alpha\n" * 20)[: int(220 * 0.9)]
    with pytest.raises(ValueError, match="'!xyz' is not in the 10 characters"):
        corpus.encode("xyz!")


def test_more_than_256_characters_take_16_bits(tmp_path, cache):
    text = "".join(map(chr, range(0x4E00, 0x4E00 + 500))) * 2
    (tmp_path / "text").write_text(text)
    corpus = data.open_corpus(str(tmp_path / "text"), tokens="characters", context=8)
    assert corpus.train.dtype == np.uint16
    assert corpus.decode(corpus.train) + corpus.decode(corpus.validation) == text


def test_bytes_decode_even_where_a_character_is_cut(tmp_path, cache):
    (tmp_path / "text").write_text("é" * 50)
    corpus = data.open_corpus(str(tmp_path / "text"), context=4)
    assert corpus.decode(corpus.encode("née")) == "née"
    assert corpus.decode(corpus.encode("né")[:-1]) == "n�"


def test_the_cache_is_used_until_a_file_changes(texts, cache, monkeypatch):
    first = data.open_corpus(str(texts), context=8)
    with monkeypatch.context() as patch:
        patch.setattr(data, "read_documents", None)
        again = data.open_corpus(str(texts), context=8)
    assert again.fingerprint == first.fingerprint
    np.testing.assert_array_equal(again.train, first.train)
    (texts / "00.txt").write_text("something else")
    assert data.open_corpus(str(texts), context=8).fingerprint != first.fingerprint


def test_a_file_replaced_by_one_of_its_size_and_time_is_read_anew(tmp_path, cache):
    text, other = tmp_path / "a.txt", tmp_path / "b.txt"
    text.write_text("ab" * 400)
    other.write_text("cd" * 400)
    times = text.stat().st_atime_ns, text.stat().st_mtime_ns
    assert data.open_corpus(str(text), tokens="characters", context=8).alphabet == "ab"
    os.utime(other, ns=times)
    os.replace(other, text)
    assert data.open_corpus(str(text), tokens="characters", context=8).alphabet == "cd"


def test_a_damaged_cache_is_made_again(texts, cache):
    first = data.open_corpus(str(texts), context=8)
    [folder] = cache.iterdir()
    tokens = bytes(first.train)
    (folder / "train.bin").write_bytes(tokens[:-1])
    assert bytes(data.open_corpus(str(texts), context=8).train) == tokens
    (folder / "corpus.json").write_text("{")
    assert bytes(data.open_corpus(str(texts), context=8).train) == tokens
    assert list(cache.iterdir()) == [folder]


@pytest.mark.parametrize("name", ["corpus.json", "train.bin"])
def test_a_cache_that_would_never_end_is_made_again(texts, cache, name):
    before = data.open_corpus(str(texts), context=8)
    [folder] = cache.iterdir()
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert data.open_corpus(str(texts), context=8).fingerprint == before.fingerprint
    (folder / "corpus.json").write_text("[" * 100_000)
    assert data.open_corpus(str(texts), context=8).fingerprint == before.fingerprint


def test_processes_that_start_together_make_one_corpus(texts, cache):
    script = (
        "import sys; from training.data import open_corpus; "
        "print(open_corpus(sys.argv[1], context=8).fingerprint)"
    )
    command = [sys.executable, "-c", script, str(texts)]
    runs = [
        subprocess.Popen(command, cwd=ROOT, env=dict(os.environ), stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    printed = {run.communicate(timeout=60)[0].strip() for run in runs}
    assert printed == {data.open_corpus(str(texts), context=8).fingerprint}
    assert len(list(cache.iterdir())) == 1


def test_the_slower_of_two_processes_takes_the_corpus_of_the_faster(texts, cache, monkeypatch):
    write = data._write
    inner = []

    def write_as_another_writes(*arguments):
        write(*arguments)
        monkeypatch.setattr(data, "_write", write)
        inner.append(data.open_corpus(str(texts), context=8))

    monkeypatch.setattr(data, "_write", write_as_another_writes)
    assert data.open_corpus(str(texts), context=8).fingerprint == inner[0].fingerprint
    assert len(list(cache.iterdir())) == 1


TOKENS = np.arange(1000, dtype=np.uint16)


def test_a_batch_is_a_function_of_seed_and_step():
    draw = functools.partial(data.training_batch, TOKENS, batch=6, context=16)
    inputs, targets = draw(seed=3, step=7)
    assert inputs.shape == targets.shape == (6, 16)
    assert inputs.dtype == targets.dtype == np.int32
    np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])
    np.testing.assert_array_equal(inputs + 1, targets)
    np.testing.assert_array_equal(draw(seed=3, step=7)[0], inputs)
    assert (draw(seed=3, step=8)[0] != inputs).any()
    assert (draw(seed=4, step=7)[0] != inputs).any()


def test_the_places_of_a_seed_never_change():
    """A run can be resumed under another release, since Philox defines these bits."""
    inputs, _ = data.training_batch(TOKENS, seed=0, step=0, batch=4, context=10)
    assert inputs[:, 0].tolist() == [689, 698, 819, 336]


@pytest.mark.parametrize("hosts", [2, 3, 6])
def test_the_hosts_share_the_batch(hosts):
    draw = functools.partial(data.training_batch, TOKENS, seed=0, step=5, batch=6, context=8)
    whole, shares = draw(), [draw(host=(i, hosts)) for i in range(hosts)]
    for part in range(2):
        np.testing.assert_array_equal(np.concatenate([s[part] for s in shares]), whole[part])


def test_every_token_can_be_drawn():
    draws = [
        data.training_batch(TOKENS[:20], seed=0, step=s, batch=8, context=16) for s in range(30)
    ]
    starts = {int(start) for inputs, _ in draws for start in inputs[:, 0]}
    assert starts == {0, 1, 2, 3}


def test_evaluation_sequences_are_spread_evenly_without_overlap():
    batches = list(data.evaluation_batches(TOKENS, batch=3, context=10, batches=5))
    assert len(batches) == 5
    starts = np.concatenate([inputs[:, 0] for inputs, _ in batches])
    assert (np.diff(starts) >= 10).all()
    assert starts[0] == 0 and starts[-1] > 900
    for inputs, targets in batches:
        np.testing.assert_array_equal(inputs + 1, targets)


def test_evaluation_of_little_data():
    batches = list(data.evaluation_batches(TOKENS[:25], batch=4, context=8, batches=5))
    assert [inputs[:, 0].tolist() for inputs, _ in batches] == [[0, 8, 16, 0]]
    batches = list(data.evaluation_batches(TOKENS[:101], batch=4, context=10, batches=5))
    assert len(batches) == 2


def test_the_hosts_share_an_evaluation():
    whole = list(data.evaluation_batches(TOKENS, batch=4, context=10, batches=2))
    halves = [
        list(data.evaluation_batches(TOKENS, batch=4, context=10, batches=2, host=(i, 2)))
        for i in range(2)
    ]
    for (inputs, _), (top, _), (bottom, _) in zip(whole, *halves, strict=True):
        np.testing.assert_array_equal(inputs, np.concatenate([top, bottom]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty", b"", "empty' is empty; give a file with text"),
        ("nul", b"ab\0c", r"nul' is binary \(it has NUL bytes\)"),
        ("latin", b"abc\xff", r"is not UTF-8 text \(byte 3 is 0xff\)"),
        ("short", b"0123456789", "the training part of short has 9 tokens, fewer .* context=16"),
        ("uneven", b"0123456789" * 8, "the validation part of uneven has 8 tokens"),
        ("one", b"x", "the training part of one has 0 tokens"),
    ],
)
def test_refuses_a_bad_file(tmp_path, cache, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        data.open_corpus(str(tmp_path / name), context=16)


def test_refuses_an_unreadable_file(texts, cache, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pathlib.Path, "read_bytes", refuse)
    with pytest.raises(ValueError, match=r"00.txt' cannot be read \(Permission denied\)"):
        data.open_corpus(str(texts / "00.txt"), context=8)


@pytest.mark.parametrize("source", ["missing.txt", "*.nothing"])
def test_refuses_what_is_not_there(source, cache):
    with pytest.raises(FileNotFoundError, match="is no file, directory or pattern that matches"):
        data.open_corpus(source, context=8)


def test_refuses_a_folder_without_text(tmp_path, cache):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.bin").write_bytes(b"\0")
    with pytest.raises(
        ValueError, match="holds no text, 1 files were passed over: .*a.bin' is binary"
    ):
        data.open_corpus(str(tmp_path / "texts"), context=8)


def test_refuses_a_cache_that_cannot_be_written(texts, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot be written .*set WSEKERN_CACHE"):
        data.open_corpus(str(texts), context=8, cache=tmp_path / "file" / "cache")


def test_refuses_hosts_that_do_not_divide_the_batch():
    with pytest.raises(ValueError, match=r"batch=6 does not divide over host=\(0, 4\)"):
        data.training_batch(TOKENS, seed=0, step=0, batch=6, context=8, host=(0, 4))


@pytest.fixture
def linked(texts):
    """`texts` with links to itself, to its parent and elsewhere, and with what is no text."""
    elsewhere = texts.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "new.txt").write_text("through a link " * 5)
    (elsewhere / "back").symlink_to(texts)
    for name, target in {"x": ".", "y": ".", "up": "..", "other": elsewhere, "gone": "no"}.items():
        (texts / name).symlink_to(target)
        (texts / "deep" / name).symlink_to(target)
    (texts / "loop").symlink_to("loop")
    os.mkfifo(texts / "pipe")
    return texts


@pytest.mark.timeout(60)
@pytest.mark.parametrize("pattern", ["**", "**/*.txt", "*/**", "**/**/*.txt", "x/y/**"])
def test_a_pattern_enters_each_real_folder_once(linked, pattern, cache):
    _, sources = corpus.find_sources([f"{linked}/{pattern}"])
    files = [source.path for source in sources if source.path.is_file()]
    assert {path.resolve() for path in files} >= {path for path in linked.glob("deep/*.txt")}
    assert linked.parent / "elsewhere" / "new.txt" in {path.resolve() for path in files}
    assert len(files) == len({path.resolve() for path in files}) <= 21
    assert data.open_corpus(f"{linked}/{pattern}", context=8).train.size


def test_patterns_match_as_glob_does(texts, monkeypatch):
    (texts / "deep" / "deeper").mkdir()
    (texts / "deep" / "deeper" / "99.txt").write_text("x")
    (texts / "deep" / ".hidden").mkdir()
    (texts / "deep" / ".hidden" / "00.txt").write_text("x")
    monkeypatch.chdir(texts)
    for start in (f"{texts}/", "", "./", "../texts/"):
        for pattern in ("*.txt", "0?.txt", "*/*.txt", "d*/[01]*.txt", "**/*.txt", "**/deeper/*",
                        "*/.h*/*", "deep/**/9*", "deep/../*.txt", "**/0[!1]*"):  # fmt: skip
            found = [source.path for source in corpus.find_sources([start + pattern])[1]]
            wanted = glob.glob(start + pattern, recursive=True)
            assert set(found) == {p for p in map(pathlib.Path, wanted) if p.is_file()}, pattern


def test_a_folder_that_cannot_be_listed_is_named(texts, cache, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    [line] = data.open_corpus(str(texts), context=8).skipped
    assert "deep' is a folder that cannot be read" in line


@pytest.mark.parametrize("name", ["train.bin", "validation.bin", "corpus.json"])
def test_a_flipped_bit_in_the_cache_is_noticed_and_the_cache_made_anew(
    name, texts, cache, monkeypatch
):
    monkeypatch.setattr(data, "_BLOCK", 100)
    first = data.open_corpus(str(texts), context=8, tokens="characters")
    wanted = [np.array(first.train), np.array(first.validation), first.fingerprint, first.vocab]
    [path] = cache.glob(f"*/{name}")
    for position in (0, path.stat().st_size // 2, path.stat().st_size - 1):
        content = bytearray(path.read_bytes())
        content[position] ^= 4
        path.write_bytes(content)
        again = data.open_corpus(str(texts), context=8, tokens="characters")
        got = [again.train, again.validation, again.fingerprint, again.vocab]
        for a, b in zip(got, wanted, strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_token_that_is_no_byte_has_no_text(texts, cache):
    opened = data.open_corpus(str(texts), context=8)
    assert (
        opened.decode(np.array([97, 256 + 98, 50_000, 99, 0xC3])) == "ac\N{REPLACEMENT CHARACTER}"
    )


def test_a_link_to_nothing_is_named_as_it_was_given(tmp_path, cache):
    for folder, target in (("one", "nowhere"), ("two", "link")):
        link = tmp_path / folder / "link"
        link.parent.mkdir()
        link.symlink_to(target)
        message = re.escape(f"data={str(link)!r} cannot be read: it is a link to {target!r}, which")
        for given in (link, link.parent, tmp_path / folder / "*"):
            with pytest.raises(ValueError, match=message) as caught:
                data.open_corpus(str(given), context=8)
            assert repr(str(given)) in str(caught.value) and "permission" not in str(caught.value)
