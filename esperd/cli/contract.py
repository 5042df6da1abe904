"""The proof of a blueprint's contract, as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from esperd.report.grid import Cell, Column, Grid

if TYPE_CHECKING:
    from esperd.growth.contract import ContractReport


def contract_grid(proof: ContractReport) -> Grid:
    """Every check: what it looked at and what it saw."""
    return Grid(
        "",
        (Column("check", style="bold"), Column("shape"), Column("result"), Column("seen", widest=70)),
        [
            (
                check.title,
                " × ".join(str(size) for size in check.shape),  # noqa: RUF001 - a product
                Cell("passed", "green") if check.passed else Cell("failed", "bold red"),
                check.detail,
            )
            for check in proof.checks
        ],
        empty="nothing was checked",
    )


def contract_line(name: str, proof: ContractReport) -> str:
    """Whether the blueprint keeps its contract."""
    failed = sum(not check.passed for check in proof.checks)
    if proof.passed:
        return f"{name} keeps its contract: {len(proof.checks)} checks passed"
    return f"{name} breaks its contract: {failed} of {len(proof.checks)} checks failed"
