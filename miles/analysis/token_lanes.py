"""What a turn of 16 tokens leaves for the next one, and adding it to the tables token by token: the histogram, the slices that change with every token, token ids."""

from __future__ import annotations

from llvmlite import ir

from miles.analysis.bin_lanes import count
from miles.analysis.terms import ROW, TOKEN_VALUES, WIDE
from miles.analysis.transposition import ORDER, half, pair_of
from miles.analysis.vectors import F32, I8, I16, I32, I64, IVEC, at, call, const, fetch, number

WAIT = 4  # columns of a slot that neighbouring tokens take in turn: an addition need not wait for the one before
STRIDE = WAIT * len(ROW) * 4 // 8  # of a slot in such a table, in units of 8 bytes
FETCH = 16  # turns ahead that rows of token ids are asked for
KINDS = 3  # of slices that change with every token
ROW_VECTOR, WORDS_VECTOR = ir.VectorType(F32, len(ROW)), ir.VectorType(I64, WIDE)
# What waits from one turn to the next, in bytes: terms (between calls), then of turns in turn, as two are in use, words, ids and whether these are plain.
WORDS, IDS, PLAIN, SIZE = 512, 768, 896, 960


class Waiting:
    """Where a turn's tokens go: words u64 [16] (the slot of each kind, and the place in the histogram, 16 bits each), rows i32 [16] of the table of token ids."""

    def __init__(self, b: ir.IRBuilder, waiting: ir.Value, turn: ir.Value) -> None:
        self._b = b
        which = b.and_(turn, number(1))
        self._words = b.add(b.add(waiting, number(WORDS)), b.mul(which, number(8 * WIDE)))
        self._ids = b.add(b.add(waiting, number(IDS)), b.mul(which, number(4 * WIDE)))
        self._plain = b.add(b.add(waiting, number(PLAIN)), b.mul(which, number(8)))

    def set_words(self, low: ir.Value, high: ir.Value) -> None:
        """Their halves, i32 [16]."""
        lanes = [i + side for i in range(WIDE) for side in (0, WIDE)]
        words = self._b.shuffle_vector(low, high, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))
        self._b.store(self._b.bitcast(words, WORDS_VECTOR), self._b.inttoptr(self._words, WORDS_VECTOR.as_pointer()), align=64)

    def set_ids(self, ids: ir.Value, plain: ir.Value) -> None:
        """Their rows in the table, in bytes; not plain: of another table."""
        b = self._b
        b.store(b.select(plain, b.mul(ids, const(IVEC, 8 * len(TOKEN_VALUES))), ir.Constant(IVEC, [0] * WIDE)), b.inttoptr(self._ids, IVEC.as_pointer()), align=64)
        b.store(b.zext(plain, I64), b.inttoptr(self._plain, I64.as_pointer()))

    def word(self, k: int) -> ir.Value:
        return self._b.load(at(self._b, self._words, number(k), I64, 8))

    def name(self, k: int) -> ir.Value:
        return self._b.zext(self._b.load(at(self._b, self._ids, number(k), I32, 4)), I64)

    def plain(self) -> ir.Value:
        return self._b.icmp_unsigned("!=", self._b.load(self._b.inttoptr(self._plain, I64.as_pointer())), number(0))


class Tables:
    """Adds the tokens of a turn that waited to the tables."""

    def __init__(self, b: ir.IRBuilder, waiting: Waiting, fours: list[ir.Value], given: dict[str, ir.Value]) -> None:
        self._b, self._waiting, self._fours, self._hot = b, waiting, fours, given["hot"]
        self._counters = b.inttoptr(given["histogram"], I16.as_pointer())
        self._tokens = b.select(waiting.plain(), given["token_table"], given["nowhere"])

    def add(self, k: int) -> None:
        """The k-th."""
        b, token = self._b, ORDER[k]
        if k % 2 == 0:
            self._rows, self._whole = self._pair(k // 2)
        row, whole = half(b, self._rows, k % 2), half(b, self._whole, k % 2)
        word = self._waiting.word(token)
        for kind in range(KINDS):
            slot = b.and_(b.lshr(word, number(16 * kind)), number(0xFFFF))
            _add(b, b.add(b.add(self._hot, number(4 * len(ROW) * (k % WAIT))), b.mul(slot, number(8))), row)
        count(b, self._counters, b.lshr(word, number(48)), k)
        _add(b, b.add(self._tokens, self._waiting.name(token)), whole)

    def _pair(self, which: int) -> tuple[ir.Value, ir.Value]:
        """Rows f32 [2, 8] of two tokens, and their TOKEN_VALUES as integers i64 [2, 4]."""
        b = self._b
        one, other = (b.load(self._fours[which // 2 + side]) for side in (0, 4))
        count = len(TOKEN_VALUES)
        whole = call(b, f"llvm.llrint.v{2 * count}i64.v{2 * count}f32", ir.VectorType(I64, 2 * count), half(b, one, which % 2))
        return pair_of(b, one, other, which % 2), whole


class Ahead:
    """Asks for the rows of token ids that will be added to."""

    def __init__(self, b: ir.IRBuilder, given: dict[str, ir.Value], index: ir.Value) -> None:
        self._b, self._table = b, given["token_table"]
        wanted, last = b.add(index, number(FETCH)), given["ahead"]
        turn = b.select(b.icmp_signed("<", wanted, last), wanted, last)
        self._ids = at(b, given["token"], b.mul(turn, number(WIDE)), I32, 4)

    def fetch(self, k: int) -> None:
        """Of the k-th token. An id beyond the table does no harm: nothing is read."""
        b = self._b
        name = b.zext(b.load(b.gep(self._ids, [number(k)]), align=4), I64)
        fetch(b, at(b, self._table, name, I8, 8 * len(TOKEN_VALUES)), 1)


def _add(b: ir.IRBuilder, address: ir.Value, value: ir.Value) -> None:
    spot = b.inttoptr(address, value.type.as_pointer())
    add = b.fadd if value.type.element == F32 else b.add
    b.store(add(b.load(spot, align=32), value), spot, align=32)
