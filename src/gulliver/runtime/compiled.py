"""The native module (runtime/native), which is there where a C++ compiler was when Gulliver was installed."""

from __future__ import annotations

from typing import Any

native: Any
try:
    from gulliver.runtime import _native as native  # type: ignore[no-redef]

    missing = None
except ImportError as _error:
    native = None
    missing = f"the native module is not there ({_error}); install a C++ compiler, then Gulliver again"
