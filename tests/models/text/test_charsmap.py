"""The tables by which SentencePiece normalizes, made by hand."""

import struct

import pytest

from models.text.charsmap import read_charsmap


def table(keys, texts):
    """A table whose trie has one root for each byte, and no letter of more bytes than one."""
    units = [0] * 1024
    for key, place in keys.items():
        node = 0
        for i, byte in enumerate(key):
            child = node ^ byte
            # The next bytes of this key alone have 256 units for themselves.
            units[child] |= byte | (256 * (i + 1) << 10)
            node = child ^ 256 * (i + 1)
        units[child] |= 1 << 8
        units[node] = 1 << 31 | place
    return struct.pack("<I1024I", 4096, *units) + texts


def test_the_longest_text_is_replaced_and_what_is_kept_stays():
    charsmap = read_charsmap(table({b"a": 0, b"ab": 2, b"x": 5}, b"1\x0022\0\0"))
    assert charsmap.places == {"a": 0, "ab": 2, "x": 5}
    assert charsmap.rewriter().rewrite("abaxb.aab") == "221b.122"
    assert charsmap.rewriter(["ax", "a"]).rewrite("abaxb") == "abaxb"
    assert charsmap.rewriter().rewrite("") == "" and charsmap.rewriter().rewrite("zb") == "zb"


LOOP = struct.pack("<I4I", 16, 0, 1 << 10 | 1, 0, 0) + b"\0"
# Each of the first 256 units leads to all of them.
FAN = struct.pack("<I256I", 1024, 0, *(i << 10 | i for i in range(1, 256))) + b"\0"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\1", "its trie is cut short"),
        (table({b"a": 0}, b"1\0")[:3000], "its trie is cut short"),
        (table({b"a": 0}, b"1"), "its trie is cut short"),
        (table({b"a": 2}, b"1\0"), "no text begins at 2"),
        (table({b"a": 1}, "é\0".encode()), "no text begins at 1"),
        (table({b"a": 0}, b"\xff\0"), "is damaged: .*utf-8"),
        (table({b"\xc3": 0}, b"1\0"), "is damaged: .*utf-8"),
        (struct.pack("<II", 4, 1 << 20) + b"\0", "leads out of it"),
        (table({b"a": 0}, b"1" * 1001 + b"\0"), "puts 1,001 bytes in a text's place"),
        (bytes(4_000_001), "has 4,000,001 bytes"),
        (LOOP, "a text of over 256 bytes"),
        (FAN, "over 1,000,000 prefixes"),
    ],
)
def test_a_damaged_table_is_refused(content, reason):
    with pytest.raises(ValueError, match=f"precompiled_charsmap .*{reason}"):
        read_charsmap(content)
