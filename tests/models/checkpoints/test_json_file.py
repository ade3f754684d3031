"""JSON from a stranger: read in bounded time, or refused with the name of its file."""

import json
import os
import socket
import time

import pytest

from models.checkpoints.json_file import read_json


def test_what_is_read(tmp_path):
    fields = {"a": [1, 2.5, None, True], "b": {"c": "Zürich"}}
    for i, prefix in enumerate((b"", b"\xef\xbb\xbf")):
        file = tmp_path / f"{i}.json"
        file.write_bytes(prefix + json.dumps(fields, ensure_ascii=False).encode())
        assert read_json(file) == fields
    (tmp_path / "link.json").symlink_to(tmp_path / "0.json")
    assert read_json(tmp_path / "link.json") == fields


# Long texts as parameters would be the names of the tests.
REFUSED = {
    "empty": (b"", "is not valid JSON"),
    "cut": (b"{", "is not valid JSON"),
    "utf-16": (b"\xff\xfe{\0}\0", "is not valid JSON: 'utf-8"),
    "list": (b"[1, 2]", r"is not a JSON object, it is \[1, 2\]"),
    "null": (b"null", "is not a JSON object, it is None"),
    "twice": (b'{"a": 1, "b": 2, "a": 1}', "'a' stands in it twice"),
    "digits": (b'{"a": ' + b"9" * 5000 + b"}", "is not valid JSON"),
    "deep": (b"[" * 100_000, "more than 64 others"),
    "deep-and-closed": (b"[" * 100_000 + b"]" * 100_000, "more than 64 others"),
    "deep-objects": (b'{"a":' * 70 + b"1" + b"}" * 70, "more than 64 others"),
    "brackets": (
        b'{"a": [' + b"[]," * 1_100_000 + b"0]}",
        "1,100,002 brackets, more than 1,000,000",
    ),
    "blank": (b" " * 2_000_000, "is not valid JSON"),
    "size": (b'{"' + b"x" * 3_900_000 + b'": 1}', "more than the 3,500,000 that it may have"),
    "many-twice": (
        b"{" + b",".join(b'"%d":0' % (i // 2) for i in range(200_000)) + b"}",
        "stands in it tw",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_at_once(case, tmp_path):
    content, message = REFUSED[case]
    file = tmp_path / "config.json"
    file.write_bytes(content)
    began = time.process_time()
    with pytest.raises(ValueError, match=message) as caught:
        read_json(file, most=3_500_000)
    assert time.process_time() - began < 2
    assert str(file) in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.skipif(not os.path.exists("/proc/kmsg"), reason="there is no such file")
def test_files_that_the_system_makes_are_refused(tmp_path):
    (tmp_path / "config.json").symlink_to("/proc/kmsg")
    with pytest.raises(ValueError, match="config.json is a link to /proc/kmsg, which the system"):
        read_json(tmp_path / "config.json")


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "zero").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        kinds = {"fifo": "a FIFO", "folder": "a folder", "zero": "a device", "socket": "a socket"}
        for name, kind in kinds.items():
            with pytest.raises(ValueError, match=f"{name} is {kind}, not a regular file"):
                read_json(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_json(tmp_path / "nowhere")
