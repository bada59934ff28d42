"""RA-Rec's alignment: ID vectors as prefixes of every layer of a language model, and its losses.

Source: Yu et al., "RA-Rec", 2024, section 3.2 and 3.3. Equations 13 to 15 are taken as they must be
meant: 13 is printed as something to maximise and added to losses, and the sums below 14 and 15 run
over pairs that belong together, which contrasts nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

INIT_STD = 0.02  # truncated at one deviation: all weights begin within 0.02 of 0


class Alignment(nn.Module):
    """One tower's prefixes: learnt instructions, then the projected ID vector, for every layer.

    Args:
        n_layers: N of the language model.
        id_size: D of the ID vectors.
        width: H of the language model's states.
        n_instructions: P_c learnt vectors a layer; 0: none.
        use_id: whether the ID vector is projected into the prefix.
        shared: whether all layers have one projector.
    """

    def __init__(
        self,
        n_layers: int,
        id_size: int,
        width: int,
        n_instructions: int = 1,
        use_id: bool = True,
        shared: bool = False,
    ) -> None:
        super().__init__()
        if not use_id and not n_instructions:
            raise ValueError("a prefix needs an ID vector or instructions")
        self.n_layers, self.use_id = n_layers, use_id
        self.instructions = nn.Parameter(torch.empty(n_layers, n_instructions, width))
        projectors = (1 if shared else n_layers) if use_id else 0
        self.weight = nn.Parameter(torch.empty(projectors, width, id_size))
        self.bias = nn.Parameter(torch.empty(projectors, width))
        for parameter in self.parameters():
            nn.init.trunc_normal_(parameter, std=INIT_STD, a=-INIT_STD, b=INIT_STD)

    def project(self, vectors: Tensor) -> Tensor:
        """Equations 3 and 4, a projection a layer. (B, D) -> (N, B, H)."""
        found = torch.einsum("nhd,bd->nbh", self.weight, vectors) + self.bias[:, None]
        return found.expand(self.n_layers, -1, -1)

    def forward(self, vectors: Tensor) -> Tensor:
        """Equations 5 and 6: instructions before the projected vector. (B, D) -> (N, B, P, H)."""
        parts = [self.instructions[:, None].expand(-1, len(vectors), -1, -1)]
        if self.use_id:
            parts.append(self.project(vectors)[:, :, None])  # (N, B, 1, H)
        return torch.cat(parts, dim=2)


class InputAlignment(nn.Module):
    """The two ways of table 4 that reach the first layer alone: before the words, as words.

    Args:
        id_size: D of the ID vectors.
        width: H of the word embeddings.
        n_instructions: learnt vectors before the ID's.
        words: embeddings of the vocabulary, (W, H): the ID vector becomes their average, weighted
            by its likeness to each (``project_inputs``); None: it is projected and no more.
    """

    def __init__(
        self, id_size: int, width: int, n_instructions: int = 1, words: Tensor | None = None
    ) -> None:
        super().__init__()
        self.projector = nn.Linear(id_size, width)
        self.instructions = nn.Parameter(torch.empty(n_instructions, width))
        for parameter in self.parameters():
            nn.init.trunc_normal_(parameter, std=INIT_STD, a=-INIT_STD, b=INIT_STD)
        self.register_buffer("words", words, persistent=False)

    def forward(self, vectors: Tensor) -> Tensor:
        """Vectors to stand before the embedded words. (B, D) -> (B, P, H)."""
        found: Tensor = self.projector(vectors)  # (B, H)
        if isinstance(self.words, Tensor):
            likeness = found @ self.words.T / self.words.shape[1] ** 0.5  # (B, W)
            found = likeness.softmax(dim=1) @ self.words
        instructions = self.instructions.expand(len(vectors), -1, -1)  # (B, P_c, H)
        return torch.cat([instructions, found[:, None]], dim=1)


class Concatenation(nn.Module):
    """The control that injects nothing: a network over an ID vector beside the vector of a text.

    Args:
        id_size: D of the ID vectors.
        width: H of the texts' vectors.
    """

    def __init__(self, id_size: int, width: int) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Linear(id_size + width, width), nn.GELU(), nn.Linear(width, width)
        )

    def forward(self, vectors: Tensor, texts: Tensor) -> Tensor:
        """(B, D), (B, H) -> (B, H)."""
        found: Tensor = self.network(torch.cat([vectors, texts], dim=1))
        return found


def bpr(liked: Tensor, other: Tensor) -> Tensor:
    """Equation 13 as a loss: minus the mean log probability that the liked item scores higher.

    Args:
        liked: scores of the items that followed. Shape: (B,).
        other: scores of others. Shape: (B,).
    """
    return -F.logsigmoid(liked - other).mean()


def in_batch_softmax(scores: Tensor, log_share: Tensor, taken: Tensor) -> Tensor:
    """Cross entropy of the item that followed among those that followed the batch's samples.

    The others of a batch tell how well an item fits beyond its popularity: the logarithm of its
    share of all training positions is taken off its score, which then holds both, however even
    over popularity the samples were drawn (after Yi et al., "Sampling-Bias-Corrected Neural
    Modeling for Large Corpus Item Recommendations", RecSys 2019, section 3).

    Args:
        scores: of users and the samples' items; the diagonal's are those that followed. (B, B)
        log_share: of all training positions, by item. Shape: (B,).
        taken: whether the user took the item at any time: then it is no negative. Shape: (B, B).

    Returns:
        The mean over users. Shape: ().
    """
    right = torch.arange(len(scores), device=scores.device)
    never = taken & (right[:, None] != right)
    return F.cross_entropy((scores - log_share).masked_fill(never, -torch.inf), right)


def distillation(scores: Tensor, teacher: Tensor) -> Tensor:
    """Cross entropy of another model's distribution over the same items.

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, at temperature 1.

    Args:
        scores: shape (B, n).
        teacher: the other model's scores, but for a constant a row. Shape: (B, n).

    Returns:
        The mean over rows. Shape: ().
    """
    return -(teacher.softmax(dim=1) * scores.log_softmax(dim=1)).sum(dim=1).mean()


def info_nce(aligned: Tensor, texts: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """Equations 14 and 15: each layer's projected vectors against the texts' states in it.

    Args:
        aligned: projected ID vectors. Shape: (N, B, H).
        texts: the mean text state that enters each layer, without prefix. Shape: (N, B, H).
        ids: which user or item each is: equal ones are no negatives of each other. Shape: (B,).
        temperature: of the cosines.

    Returns:
        The mean over layers and pairs. Shape: ().
    """
    cosine = F.normalize(aligned, dim=2) @ F.normalize(texts, dim=2).transpose(1, 2)  # (N, B, B)
    same = ids[:, None] == ids
    same.fill_diagonal_(False)
    logits = (cosine / temperature).masked_fill(same, -torch.inf)
    right = torch.arange(len(ids), device=ids.device).expand(len(aligned), -1)  # (N, B)
    return F.cross_entropy(logits.transpose(1, 2), right)
