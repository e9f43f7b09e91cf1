"""Counts of graphs that torch.compile makes in this process."""

from __future__ import annotations

from tools.torch_private import compile_counts


class CompileCount:
    """Graphs and graph breaks since it was made, and recompiles.

    A recompile is a graph compiled after `warm()`, the declared end of the warm-up.
    """

    def __init__(self):
        self._graphs, self._breaks = compile_counts()
        self._warm: int | None = None

    def warm(self) -> None:
        """From here on, a compile is a recompile."""
        self._warm, _ = compile_counts()

    @property
    def graphs(self) -> int:
        return compile_counts()[0] - self._graphs

    @property
    def breaks(self) -> int:
        return compile_counts()[1] - self._breaks

    @property
    def recompiles(self) -> int | None:
        return None if self._warm is None else compile_counts()[0] - self._warm
