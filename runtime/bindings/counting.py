"""What a fit of predictors counts in many numbers, by the native library: see `lzn_margins` in lazyneuron.h."""

from __future__ import annotations

import ctypes
import functools

import numpy as np
import numpy.typing as npt

from runtime.bindings import sparse_ffn

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int32]


class _Margins(ctypes.Structure):
    """`struct lzn_margins`."""

    _fields_ = [
        ("n_tokens", ctypes.c_int64),
        ("n_neurons", ctypes.c_int64),
        ("n_bins", ctypes.c_int64),
        ("scores", ctypes.c_void_p),
        ("fired", ctypes.c_void_p),
        ("energy", ctypes.c_void_p),
        ("slope", ctypes.c_void_p),
        ("offset", ctypes.c_void_p),
        ("predicted", ctypes.c_void_p),
        ("hits", ctypes.c_void_p),
        ("kept", ctypes.c_void_p),
    ]


@functools.cache
def _library() -> ctypes.CDLL:
    lib = sparse_ffn.library()
    lib.lzn_sizeof_margins.restype = ctypes.c_size_t
    assert lib.lzn_sizeof_margins() == ctypes.sizeof(_Margins)
    lib.lzn_count_margins.argtypes = [ctypes.POINTER(_Margins)]
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    lib.lzn_moments.argtypes = [pointer, pointer, number, number, pointer]
    lib.lzn_count_margins.restype = lib.lzn_moments.restype = None
    return lib


def count_margins(
    scores: Floats, fired: npt.NDArray[np.bool_], energy: Floats, slope: Floats, offset: Floats, n_bins: int
) -> tuple[Counts, Counts, Doubles]:
    """In which of `n_bins` bins scores [n_tokens, n] lie: the whole part of slope x score + offset (float32 [n] both),
    or the nearest bin.

    Returns, for each neuron and bin, [n, n_bins]: tokens, those at which the neuron fired, and the energy of these.
    """
    n_tokens, n = scores.shape
    given = [np.ascontiguousarray(a, np.float32) for a in (scores, energy, slope, offset)]
    s, e, a, b = given
    f = np.ascontiguousarray(fired, np.bool_)
    assert e.shape == f.shape == s.shape and a.shape == b.shape == (n,)
    predicted, hits, kept = (np.zeros((n, n_bins), kind) for kind in (np.int32, np.int32, np.float64))
    arrays = (s, f, e, a, b, predicted, hits, kept)
    _library().lzn_count_margins(ctypes.byref(_Margins(n_tokens, n, n_bins, *(x.ctypes.data for x in arrays))))
    return predicted, hits, kept


def moments(scores: Floats, goal: Floats) -> Doubles:
    """Sums over tokens of scores, goals, their squares and their products: float64 [5, n], from [n_tokens, n] each."""
    s, g = np.ascontiguousarray(scores, np.float32), np.ascontiguousarray(goal, np.float32)
    assert s.shape == g.shape
    sums = np.empty((5, s.shape[1]), np.float64)
    _library().lzn_moments(s.ctypes.data, g.ctypes.data, *s.shape, sums.ctypes.data)
    return sums
