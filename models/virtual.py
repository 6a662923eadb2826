"""Virtual tokens: P trained rows in front of every document of a flat stream.

They are soft tokens, rows of the embedding that stand for no word (prompt tuning; Lester et al., 2021), or the keys and
values of a prefix in every layer (prefix tuning; Li and Liang, 2021). Each document of a packed stream sees its own P rows
and no other's. The cache of decoding holds them as the first P tokens of a document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from minilora.kernels.dispatch import to_device

from .layers import Adapted
from .stream import Context, Documents


class Virtual(Adapted):
    """What a Decoder calls between its embedding and its blocks, where it has virtual tokens."""

    base = None  # there was nothing in its place
    count: int  # P
    counted = True  # whether the positions of a document begin after them, at P

    def projection(self) -> None:
        """None: it is no linear."""

    def rows(self, x: Tensor, documents: Documents, index: Tensor | None) -> tuple[Tensor, Documents, Tensor | None]:
        """The rows x [T, D] that go into the blocks, their documents, and the index of those that come out of them."""
        raise NotImplementedError

    def forward(self, x: Tensor, documents: Documents, index: Tensor | None) -> tuple[Tensor, Documents, Tensor | None]:
        if documents.prompt_lens is not None:  # decoding: the cache holds them
            return x, documents, index
        return self.rows(x, documents, index)

    def longer(self, documents: Documents) -> Documents:
        """The documents with P tokens more in front of each, the bidirectional prefix of a prefix LM included."""
        prefix_lens = documents.prefix_lens and [n + self.count for n in documents.prefix_lens]
        found = Documents.of([n + self.count for n in documents.lengths], prefix_lens)
        return replace(found, cache=documents.cache).to(documents.positions.device)


class Front:
    """Where the rows of S documents, and P more in front of each, lie in the stream of both."""

    def __init__(self, cu_seqlens: Sequence[int], count: int, device: torch.device):
        self.documents = len(cu_seqlens) - 1
        first = self.documents * count
        parts = [
            part
            for i, (start, end) in enumerate(pairwise(cu_seqlens))
            for part in (torch.arange(i * count, (i + 1) * count), torch.arange(first + start, first + end))
        ]
        order = torch.cat(parts)
        self.order = to_device(order, device)  # of rows that are P for each document, then all of the documents
        self.own = to_device((order >= first).nonzero().flatten(), device)  # where the documents' own rows come to lie

    def put(self, front: Tensor, x: Tensor) -> Tensor:
        """front [P, ...] before each document of x [T, ...] -> [T + S P, ...].

        Each document has a copy of its own, so that no row is read twice: the backward adds in one order.
        """
        copies = front.expand(self.documents, *front.shape).flatten(0, 1)
        return torch.cat((copies, x)).index_select(0, self.order)


@dataclass(frozen=True)
class Past:
    """The keys and values of a prefix: layers[i] [2, P, G, E] in the compute dtype.

    The P rows have queries too, of zeros, whose outputs are dropped: the stream with them is an ordinary one, for every path
    of attention and for the cache. They are P rows more of attention a document, and a copy of q, k and v.
    """

    layers: tuple[Tensor, ...]
    front: Front
    documents: Documents  # with the P rows in front

    def attend(self, context: Context, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        past_k, past_v = self.layers[layer]
        inner = replace(context, documents=self.documents)
        q, k, v = (
            self.front.put(f, x) for f, x in ((q.new_zeros(len(past_k), *q.shape[1:]), q), (past_k, k), (past_v, v))
        )
        return inner.attend(layer, q, k, v, window).index_select(0, self.front.own)
