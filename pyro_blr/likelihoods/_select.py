"""log a[k] for every state k of an index that is data or enumerated."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_blr.shapes import broadcast_shape


def select(log: Tensor, index: Tensor) -> Tensor:
    """log (*batch, V), index (*batch) -> log[..., index], over the broadcast of the two batches.

    Neither it nor its gradient holds a tensor of the broadcast batch times V: the dims that log and index
    share are folded into the index, those of log alone stay in front of it, so that K rows and N indices make
    one lookup of N columns.
    """
    index = index.long()
    batch = broadcast_shape(log.shape[:-1], index.shape)
    size = log.size(-1)
    if log.shape[:-1] == batch:
        return log.gather(-1, index.expand(batch).unsqueeze(-1)).squeeze(-1)
    dims = len(batch)
    log = log.reshape((1,) * (dims + 1 - log.dim()) + log.shape)
    index = index.reshape((1,) * (dims - index.dim()) + index.shape)
    shared = [i for i in range(dims) if log.size(i) != 1 and index.size(i) != 1]
    rows = [i for i in range(dims) if log.size(i) != 1 and index.size(i) == 1]
    columns = [i for i in range(dims) if i not in shared and i not in rows]
    order = rows + shared + columns

    groups = (rows, shared, columns)
    num_rows, num_shared, num_columns = (torch.Size([batch[i] for i in group]).numel() for group in groups)
    table = log.permute(*order, dims).reshape(num_rows, num_shared * size)
    index = index.permute(order).reshape(num_shared, num_columns)
    index = index + size * torch.arange(num_shared, device=index.device).unsqueeze(-1)
    if num_shared == 1 and rows and columns and rows[0] > columns[-1]:  # written in the order it is handed out in
        order = columns + rows
        selected = table.mT[index.flatten()].reshape([batch[i] for i in order])
    else:
        selected = table[:, index.flatten()].reshape([batch[i] for i in order])
    return selected.permute([order.index(i) for i in range(dims)])
