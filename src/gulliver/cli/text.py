"""Tables and numbers for people."""

from __future__ import annotations

from typing import Any


def evidence_table(evidence: list[dict[str, Any]]) -> list[str]:
    """Metric, value and interval; in the order given."""
    if not evidence:
        return ["no evidence yet; `gulliver audit` measures"]
    rows = [
        (
            item["metric"],
            _number(item["value"]),
            f"{_number(item['low'])} … {_number(item['high'])}",
            item["unit"],
            str(item["n"]),
        )
        for item in evidence
    ]
    return table(("metric", "value", "95 % interval", "unit", "n"), rows)


def _number(value: Any) -> str:
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.5g}"
    return "not a number" if value is None else f"{value:,.0f}" if isinstance(value, int | float) else str(value)


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    ]


def megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.1f} MB"
