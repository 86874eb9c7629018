"""The record's bytes are msgpack's, whatever is in it; reading them gives views, and what is no record is refused."""

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.data.store.msgpack_views import pack, unpack

scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text() | st.sampled_from(["\ud800", "x" * 70000])
values = st.recursive(scalars, lambda each: st.lists(each, max_size=20) | st.dictionaries(st.text(max_size=5), each, max_size=20), max_leaves=60)


@settings(max_examples=200, deadline=None)
@given(values)
def test_bytes_are_those_of_msgpack_and_come_back(value):
    content = b"".join(pack(value))
    assert content == msgpack.packb(value, use_bin_type=True, unicode_errors="surrogatepass")
    assert unpack(content) == value


@pytest.mark.parametrize("size", [0, 1, 255, 256, 65535, 65536])
def test_arrays_are_raw_bytes_written_and_read_in_place(size):
    array = np.arange(size, dtype=np.uint8)
    pieces = pack({"a": [array, 1]})
    assert any(isinstance(piece, memoryview) and (size == 0 or np.shares_memory(np.frombuffer(piece, np.uint8), array)) for piece in pieces)
    content = b"".join(pieces)
    assert content == msgpack.packb({"a": [array.tobytes(), 1]}, use_bin_type=True)
    found = unpack(content)["a"][0]
    assert found.tobytes() == array.tobytes()
    assert size == 0 or np.shares_memory(np.frombuffer(found, np.uint8), np.frombuffer(content, np.uint8))


@pytest.mark.parametrize("count", [15, 16, 65535, 65536])
def test_long_lists_and_objects(count):
    for value in (list(range(count)), {str(number): [number] for number in range(count)}, [[number] for number in range(count)]):
        content = b"".join(pack(value))
        assert content == msgpack.packb(value)
        assert unpack(content) == value


@pytest.mark.parametrize("content", [b"", b"\x93\x01\x02", b"\xda\x00", b"\xc4\x05ab", b"\xc1", b"\xd4\x00\x00", b"\x01\x02", b"\xcb\x00"])
def test_what_is_no_record_is_refused(content):
    with pytest.raises(ValueError, match="msgpack"):
        unpack(content)
