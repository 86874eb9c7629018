"""Sums whose bits don't depend on the order of adding: fp64 numbers as fixed-point integers of 512 bits.

Each number is cut into digits of 32 bits, counted in int64; 2^31 additions fit before one could overflow. Adding two such sums is
adding integers, so any partition of the work over processes, merged in any order, gives the same bits.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from miles.analysis.compiled import kernel

DIGITS = 16
LOWEST = -256  # exponent of the last bit: what lies below is cut off, towards zero
Digits = NDArray[np.int64]


def zeros(*shape: int) -> Digits:
    """Sums of this shape, all 0: int64 [*shape, DIGITS]."""
    return np.zeros((*shape, DIGITS), np.int64)


def add(sums: Digits, values: NDArray[np.float64]) -> None:
    """sums [*shape, DIGITS] += values f64 [*shape], which are finite and below 2^255."""
    _add(sums.reshape(-1, DIGITS), np.ascontiguousarray(values, np.float64).reshape(-1))


def value(sums: Digits) -> NDArray[np.float64]:
    """The sums, each rounded once to fp64; [*shape]."""
    flat = sums.reshape(-1, DIGITS)
    found = np.empty(len(flat))
    for i, digits in enumerate(flat.tolist()):
        total = sum(digit << (32 * place) for place, digit in enumerate(digits))
        found[i] = total / (1 << -LOWEST)  # Python divides integers with one rounding
    return found.reshape(sums.shape[:-1])


def rough(sums: Digits) -> NDArray[np.float64]:
    """Carried sums of numbers that are not negative, each within 1e-15 of itself; [*shape]. Of hundreds of thousands, value() takes seconds."""
    found = np.zeros(sums.shape[:-1])
    for place in range(DIGITS):
        found += sums[..., place] * 2.0 ** (32 * place + LOWEST)
    return found


@kernel
def _add(sums, values):
    bits = values.view(np.int64)
    for i in range(len(values)):
        number = bits[i]
        exponent = (number >> 52) & 0x7FF
        if exponent == 0:
            continue  # zero, or far below LOWEST
        mantissa = np.uint64((number & ((1 << 52) - 1)) | (1 << 52))
        place = exponent - 1075 - LOWEST
        if place > 32 * DIGITS - 64:
            raise OverflowError("a sum of the analysis is not finite or too large")
        if place < 0:
            mantissa = mantissa >> np.uint64(-place) if place > -64 else np.uint64(0)
            place = 0
        digit, shift = place >> 5, np.uint64(place & 31)
        low = (mantissa & np.uint64(0xFFFFFFFF)) << shift
        high = ((mantissa >> np.uint64(32)) << shift) + (low >> np.uint64(32))
        sign = -1 if number < 0 else 1
        sums[i, digit] += sign * np.int64(low & np.uint64(0xFFFFFFFF))
        sums[i, digit + 1] += sign * np.int64(high & np.uint64(0xFFFFFFFF))
        sums[i, digit + 2] += sign * np.int64(high >> np.uint64(32))


def add_rows(sums: Digits, rows: NDArray[np.int64], values: NDArray[np.float64]) -> None:
    """sums [R, width, DIGITS]: row rows[i] += values f64 [i, width]; a row may be named several times."""
    _add_rows(sums, rows, np.ascontiguousarray(values, np.float64))


@kernel
def _add_rows(sums, rows, values):
    for i in range(len(rows)):
        _add(sums[rows[i]], values[i])


def add_integers(sums: Digits, rows: NDArray[np.int64], values: NDArray[np.int64], units: NDArray[np.int64]) -> None:
    """sums [R, width, DIGITS]: row rows[i] += values i64 [i, width] times 2^units[width]; units above LOWEST and below 100."""
    _add_integers(sums, rows, values, units)


@kernel
def _add_integers(sums, rows, values, units):
    for i in range(len(rows)):
        for w in range(len(units)):
            number = values[i, w]
            sign = -1 if number < 0 else 1
            size = np.uint64(abs(number))
            place = units[w] - LOWEST
            digit, shift = place >> 5, np.uint64(place & 31)
            low = (size & np.uint64(0xFFFFFFFF)) << shift
            high = ((size >> np.uint64(32)) << shift) + (low >> np.uint64(32))
            sums[rows[i], w, digit] += sign * np.int64(low & np.uint64(0xFFFFFFFF))
            sums[rows[i], w, digit + 1] += sign * np.int64(high & np.uint64(0xFFFFFFFF))
            sums[rows[i], w, digit + 2] += sign * np.int64(high >> np.uint64(32))


def carry(sums: Digits, rows: NDArray[np.int64]) -> None:
    """Bring these rows of sums [R, width, DIGITS] to the one form that a number has: digits from 0 to 2^32, the last one with the sign."""
    _carry(sums, rows)


@kernel
def _carry(sums, rows):
    for i in range(len(rows)):
        for w in range(sums.shape[1]):
            over = np.int64(0)
            for k in range(DIGITS - 1):
                whole = sums[rows[i], w, k] + over
                over = whole >> 32
                sums[rows[i], w, k] = whole - (over << 32)
            sums[rows[i], w, DIGITS - 1] += over
