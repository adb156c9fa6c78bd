"""The order of samples as a pure function of (seed, epoch, position): no state, O(1) memory, any length.

A keyed Feistel network permutes `[0, 2**k)`, the smallest such range that holds all samples; walking along its
cycles until the value is a sample again makes it a permutation of `[0, n)` (Black and Rogaway, "Ciphers with
arbitrary finite domains", 2002). Fewer than two walks are needed on average, since `2**k < 2 n`.
"""

from __future__ import annotations

import hashlib

import numpy as np

_ROUNDS = 6
_MIX_A = np.uint64(0xFF51AFD7ED558CCD)  # MurmurHash3's 64-bit finaliser
_MIX_B = np.uint64(0xC4CEB9FE1A85EC53)
_SHIFT = np.uint64(33)


def sample_ids(seed: int, dataset_size: int, positions: np.ndarray) -> np.ndarray:
    """Return the sample ids at some positions of the endless order, in which each epoch is one permutation of all
    samples.

    Args:
        positions: int64 array of any shape with values >= 0.

    Returns:
        int64 array of the same shape with values in `[0, dataset_size)`.
    """
    positions = np.asarray(positions, dtype=np.int64)
    epochs = positions // dataset_size
    ids = np.empty_like(positions)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        ids[here] = permute(seed, int(epoch), dataset_size, positions[here] % dataset_size)
    return ids


def permute(seed: int, epoch: int, n: int, positions: np.ndarray) -> np.ndarray:
    """Return the permutation of `[0, n)` of (seed, epoch) at `positions` (int64 array, values in `[0, n)`)."""
    bits = max(2, (n - 1).bit_length())
    keys = _round_keys(seed, epoch)
    out = _feistel(positions.astype(np.uint64), bits, keys)
    outside = out >= np.uint64(n)
    while outside.any():
        out[outside] = _feistel(out[outside], bits, keys)
        outside = out >= np.uint64(n)
    return out.astype(np.int64)


def _round_keys(seed: int, epoch: int) -> np.ndarray:
    digest = hashlib.blake2b(f"elastic.order/{seed}/{epoch}".encode(), digest_size=8 * _ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8")


def _feistel(x: np.ndarray, bits: int, keys: np.ndarray) -> np.ndarray:
    """An alternating Feistel network on `bits` bits: each round adds a keyed hash of one half to the other half."""
    low_bits = np.uint64(bits // 2)
    low_mask = np.uint64((1 << (bits // 2)) - 1)
    high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    low, high = x & low_mask, x >> low_bits
    for i in range(_ROUNDS):
        if i % 2:
            low = (low + _mix(high ^ keys[i])) & low_mask
        else:
            high = (high + _mix(low ^ keys[i])) & high_mask
    return (high << low_bits) | low


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> _SHIFT)) * _MIX_A
    x = (x ^ (x >> _SHIFT)) * _MIX_B
    return x ^ (x >> _SHIFT)
