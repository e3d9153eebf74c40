"""Decoding on CUDA as recorded graphs: a pass over a few tokens is hundreds of small kernels, and
starting them one by one takes longer than they do. By reading: no GPU has run it.

A graph is recorded for each width (rows, a power of two) and reach (slots looked at, a multiple of
256), with all that it reads in place: the ids, the cache, `filled`. MoD picks its tokens by number,
so its shapes vary and it runs as it is.
"""

from __future__ import annotations

import torch

from model import KVCache, Transformer

REACH = 256


class Graphs:
    """graphs(idx (n, 1) on the host, view of n rows) -> logits (n, V), which the next call
    overwrites."""

    def __init__(self, model: Transformer):
        self.model = model
        self.device = model.embed.weight.device
        self.works = not model.sparse_layers("mod")
        self.recorded: dict[tuple, tuple] = {}
        self.pool = None  # of memory, shared by all graphs

    def __call__(self, idx: torch.Tensor, view: KVCache) -> torch.Tensor:
        if not self.works:
            return self.model(idx.to(self.device), cache=view)
        reach = min(-(-(view.used + 1) // REACH) * REACH, view.length)
        key = (view.filled.data_ptr(), len(idx), reach)
        if key not in self.recorded:
            self.recorded[key] = self.record(len(idx), view, reach)
        graph, given, logits = self.recorded[key]
        given.copy_(idx, non_blocking=True)
        graph.replay()
        return logits

    def record(self, n: int, view: KVCache, reach: int) -> tuple:
        given = torch.full((n, 1), -1, device=self.device)  # pads change no row

        def run() -> torch.Tensor:
            view.used = reach - 1  # and place() adds the token's own
            return self.model(given, cache=view)

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # what is made or tuned at the first call is none of the graph's
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            logits = run()
        self.pool = graph.pool()
        return graph, given, logits
