"""Ways to make the header of a safetensors file lie."""

import json
import random
from collections.abc import Callable
from typing import Any

# A change of a header: gets its arrays by name, and the generator; returns other bytes for it.
Change = Callable[[dict[str, Any], random.Random], bytes | None]


def _set(key: str, value: Any) -> Change:
    def change(header: dict[str, Any], source: random.Random) -> None:
        header[source.choice(list(header))][key] = value

    return change


def _shift(begin: int, end: int) -> Change:
    def change(header: dict[str, Any], source: random.Random) -> None:
        entry = header[source.choice(list(header))]
        entry["data_offsets"] = [entry["data_offsets"][0] + begin, entry["data_offsets"][1] + end]

    return change


def _entries(entries: dict[str, Any]) -> Change:
    def change(header: dict[str, Any], source: random.Random) -> None:
        del source
        header.update(entries)

    return change


def _rename(header: dict[str, Any], source: random.Random) -> None:
    name = source.choice(list(header))
    header[source.choice(("x", f"{name}x", name[1:], name.upper(), "\ud800"))] = header.pop(name)


def _remove(header: dict[str, Any], source: random.Random) -> None:
    del header[source.choice(list(header))]


def _without_key(header: dict[str, Any], source: random.Random) -> None:
    entry = header[source.choice(list(header))]
    del entry[source.choice(list(entry))]


def _exchange(header: dict[str, Any], source: random.Random) -> None:
    """Two arrays of different shapes under each other's name."""
    first, second = source.sample(list(header), 2)
    while header[first]["shape"] == header[second]["shape"]:
        first, second = source.sample(list(header), 2)
    header[first], header[second] = header[second], header[first]


def _twice(header: dict[str, Any], source: random.Random) -> bytes:
    name = source.choice(list(header))
    text = json.dumps(header)
    return f"{text[:-1]}, {json.dumps(name)}: {json.dumps(header[name])}}}".encode()


def _swap_shape(header: dict[str, Any], source: random.Random) -> None:
    names = [name for name, e in header.items() if len(set(e["shape"])) == 2]
    header[source.choice(names)]["shape"].reverse()


_NOTHING = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
CHANGES: dict[str, Change] = {
    "ends beyond the file": _shift(0, 10**6),
    "lies beyond the file": _shift(10**6, 10**6),
    "overlaps": _shift(-4, -4),
    "leaves a hole": _shift(4, 4),
    "is longer than its shape": _shift(0, 4),
    "begins after its end": _shift(10**3, 0),
    "negative offsets": _set("data_offsets", [-8, 0]),
    "offsets of 2**63": _set("data_offsets", [2**63, 2**63 + 8]),
    "three offsets": _set("data_offsets", [0, 4, 8]),
    "offsets as text": _set("data_offsets", ["0", "8"]),
    "true as offset": _set("data_offsets", [False, True]),
    "negative dimension": _set("shape", [-1, 16]),
    "fraction as dimension": _set("shape", [16.0]),
    "dimension of 2**62": _set("shape", [2**62, 4]),
    "dimensions of 10**30": _set("shape", [10**30] * 30),
    "a million dimensions": _set("shape", [1] * 10**6),
    "40 dimensions": _set("shape", [1] * 40),
    "shape as a number": _set("shape", 16),
    "shape as an object": _set("shape", {"0": 16}),
    "unknown dtype": _set("dtype", "Q4_0"),
    "dtype as a number": _set("dtype", 32),
    "dtype as a list": _set("dtype", ["F32"]),
    "integers": _set("dtype", "I32"),
    "another name": _rename,
    "an array is missing": _remove,
    "a key is missing": _without_key,
    "two arrays exchanged": _exchange,
    "a name twice": _twice,
    "a shape reversed": _swap_shape,
    "an array too many": _entries({"extra.weight": _NOTHING}),
    "a list as array": _entries({"extra.weight": [1]}),
    "metadata of numbers": _entries({"__metadata__": {"format": 1}}),
    "metadata as a list": _entries({"__metadata__": ["pt"]}),
    "60,000 arrays too many": _entries({f"extra.{i}": _NOTHING for i in range(60_000)}),
    "100,000 arrays too many": _entries({f"extra.{i}": _NOTHING for i in range(100_000)}),
    "a long name": _entries({"x" * 10**6: _NOTHING}),
    "not JSON": lambda header, source: json.dumps(header).encode()[:-1] + b",}",
    "not an object": lambda header, source: json.dumps(list(header)).encode(),
    "brackets": lambda header, source: b'{"a":' + b"[" * 100_000,
    "empty": lambda header, source: b"",
}
