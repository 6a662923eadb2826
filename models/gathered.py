"""A frozen weight whose memory other weights use in turn (minilora/ranks/shard.py)."""

from torch import Tensor, nn


class GatheredWeight(nn.Parameter):
    """A view of a buffer, which holds this weight while its layer computes. It has a part in no other storage."""

    first: Tensor  # its first values, by which a base model is recognised
