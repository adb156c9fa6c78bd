"""Exceptions in one line."""

from __future__ import annotations

import pytest

from elastic.errors import one_line

CUDA = "CUDA error: device-side assert triggered\nCUDA kernel errors might be asynchronous\nCompile with DSA\n"
LOADER = "Caught ValueError in worker 0.\nOriginal Traceback (most recent call last):\n  ...\nValueError: torn jpeg\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError(CUDA), "RuntimeError: CUDA error: device-side assert triggered"),
        (OSError(LOADER), "OSError: ValueError: torn jpeg"),
        (KeyError("a"), "KeyError: 'a'"),
        (TimeoutError(), "TimeoutError"),
        (ValueError("\n  first\n"), "ValueError: first"),
    ],
)
def test_one_line_says_what_was_raised_and_not_what_torch_adds(error: Exception, line: str) -> None:
    assert one_line(error) == line
