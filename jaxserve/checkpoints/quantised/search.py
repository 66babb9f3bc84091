"""Floats quantised with the least error that a search finds, where codes have few bits.

`pallas_kernels.weights.quantise` lets a group's codes reach its largest number. With 16 to 64 codes
it is often better to round that one number further and all others less. For each group some scales
around that one are tried; the codes that one gives are kept, and the scale (and minimum) with the
least squared error for those codes follows from them. The better of both is taken, group by group.
"""

from typing import Any

import numpy as np

from pallas_kernels.weights import Format, Quantised, pack, quantise, unpack

# How many codes more or fewer than there are the range of a group is divided by.
_STRETCHES = np.array([0, -1.2, -0.8, -0.4, 0.4, 0.8, 1.6, 3.2], np.float32)
_PART = 2**16  # numbers at a time: what is made of them on the way stays in the cache


def quantise_float(array: np.ndarray, format: Format) -> Quantised:
    """The weight [out..., in] in a format, of the least squared error that the search finds.

    Rows are taken a part at a time: beside the array and the result, memory is a few MB.

    Args:
        array: floating, [out..., in].
        format: of the result. Only codes of 4 to 6 bits are searched for; with 8 bits the error
            is small, and the largest number's share of it large.

    Raises:
        ValueError: the inputs do not fall into groups of the format.
    """
    if not format.is_packed:
        return quantise(array, format)
    outputs, inputs = array.shape[:-1], array.shape[-1]
    format.check_inputs(inputs)
    rows = array.reshape(-1, inputs)
    groups = (len(rows), format.num_groups(inputs))
    values = np.empty((len(rows), format.value_bytes(inputs)), np.uint8)
    scales = np.empty(groups, format.scale)
    minimums = np.empty_like(scales) if format.has_minimums else None
    step = max(1, _PART // inputs)
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        found = _quantise_part(rows[part].astype(np.float32), format)
        values[part], scales[part] = found.values, found.scales
        if minimums is not None:
            minimums[part] = found.minimums
    if minimums is not None:
        minimums = minimums.reshape(*outputs, -1)
    return Quantised(values.reshape(*outputs, -1), scales.reshape(*outputs, -1), minimums, format)


def _quantise_part(rows: np.ndarray, format: Format) -> Quantised:
    plain = quantise(rows, format)
    numbers = rows.reshape(*plain.scales.shape, -1)
    if format.has_minimums:
        scales, minimums = _search_range(numbers, 2**format.bits - 1)
    else:
        scales, minimums = _search_scale(numbers, format.offset), None
    limit = float(np.finfo(np.float16).max) if format.scale == "float16" else np.inf
    scales = np.clip(scales, -limit, limit).astype(format.scale)
    if minimums is not None:
        minimums = np.clip(minimums, -limit, limit).astype(format.scale)
    codes = _nearest_codes(numbers, scales, minimums, format)
    searched = Quantised(pack(codes.reshape(rows.shape), format), scales, minimums, format)
    return _better(numbers, searched, plain)


def _nearest_codes(
    numbers: np.ndarray, scales: np.ndarray, minimums: np.ndarray | None, format: Format
) -> np.ndarray:
    """Codes [..., inputs of a group] for known scales."""
    wide = scales.astype(np.float32)[..., None]
    if minimums is not None:
        numbers = numbers - minimums.astype(np.float32)[..., None]
    codes = np.rint(numbers * _inverse(wide)) + np.float32(format.offset)
    return np.clip(codes, 0, 2**format.bits - 1).astype(np.uint8)


def _search_scale(numbers: np.ndarray, offset: int) -> np.ndarray:
    """The best scale of each group [..., inputs of a group] for codes from -offset to offset - 1.

    The largest number takes the code that is farthest from zero, whatever its sign.
    """
    low, high = _extremes(numbers)
    largest = np.where(-low > high, low, high)
    best, best_gain = -largest / np.float32(offset), np.zeros_like(largest)
    for stretch in _STRETCHES:
        codes = numbers * (-(offset + stretch) * _inverse(largest))[..., None]
        np.clip(np.rint(codes, out=codes), -offset, offset - 1, out=codes)
        product, square = _dot(numbers, codes), _dot(codes, codes)
        # The squared error of the best scale, product / square, is that of zeros less this.
        gain = product * product * _inverse(square)
        better = gain > best_gain
        best[better] = (product * _inverse(square))[better]
        best_gain[better] = gain[better]
    return best


def _search_range(numbers: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """The best scale and minimum of each group [..., inputs of a group] for codes 0 to `most`."""
    count = np.float32(numbers.shape[-1])
    mean = _sum(numbers) / count
    centred = numbers - mean[..., None]  # or sums of squares would drown in the mean's
    low, high = _extremes(centred)
    best, best_low = (high - low) / np.float32(most), low + mean
    best_gain = np.zeros_like(best)
    above = centred - low[..., None]
    for stretch in _STRETCHES:
        codes = above * ((most + stretch) * _inverse(high - low))[..., None]
        np.clip(np.rint(codes, out=codes), 0, most, out=codes)
        average = _sum(codes) / count
        product, square = _dot(centred, codes), _dot(codes, codes) - count * average * average
        gain = product * product * _inverse(square)
        better = gain > best_gain
        scale = product * _inverse(square)
        best[better] = scale[better]
        best_low[better] = (mean - scale * average)[better]
        best_gain[better] = gain[better]
    return best, best_low


def _better(numbers: np.ndarray, one: Quantised, other: Quantised) -> Quantised:
    """Of each group what has the smaller squared error, `one` where both have the same."""
    errors = [
        _dot(wrong, wrong)
        for wrong in (
            numbers - weight.dequantise().reshape(numbers.shape) for weight in (one, other)
        )
    ]
    first = errors[0] <= errors[1]
    codes = [unpack(w.values, w.format).reshape(numbers.shape) for w in (one, other)]
    merged = np.where(first[..., None], *codes).reshape(one.shape)
    minimums = None
    if one.minimums is not None:
        minimums = np.where(first, one.minimums, other.minimums)
    scales = np.where(first, one.scales, other.scales)
    return Quantised(pack(merged, one.format), scales, minimums, one.format)


def _extremes(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest along the last axis; NumPy is slow along a short one."""
    turned = np.ascontiguousarray(np.moveaxis(numbers, -1, 0))
    return turned.min(0), turned.max(0)


def _sum(a: np.ndarray) -> np.ndarray:
    return np.einsum("...i->...", a)


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.einsum("...i,...i->...", a, b)


def _inverse(numbers: Any) -> np.ndarray:
    """One over each number; 0 for 0."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / numbers
    return np.where(np.isfinite(inverse), inverse, np.float32(0))
