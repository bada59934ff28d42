"""RecBole's graph models on today's scipy, whose `dok_matrix` lost the `_update` that they call.

Each class is RecBole's, under RecBole's name; only the making of its graph is new, and quicker.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from recbole.model import general_recommender as recbole
from sklearn.cluster import KMeans
from torch import Tensor
from torch.nn import functional as F

_EPSILON = 1e-7  # RecBole's, against a division by zero


def bipartite_graph(interactions: sp.coo_matrix, n_users: int, n_items: int) -> sp.coo_matrix:
    """Users and items as nodes, an edge of weight 1 in both directions for each interacting pair.

    Args:
        interactions: pairs may repeat. Shape: (n_users, n_items).

    Returns:
        Items follow users. Shape: (n_users + n_items, n_users + n_items).
    """
    users, items = interactions.row, interactions.col + n_users
    ends = np.concatenate([users, items]), np.concatenate([items, users])
    size = n_users + n_items
    graph = sp.csr_matrix((np.ones(len(ends[0])), ends), shape=(size, size))
    graph.sum_duplicates()
    graph.data[:] = 1
    return graph.tocoo()


def scaled(graph: sp.coo_matrix, left: float, right: float) -> Tensor:
    """The sparse matrix D^left A D^right, D the nodes' degrees. Shape: that of `graph`."""
    degree = np.bincount(graph.row, minlength=graph.shape[0]) + _EPSILON
    values = degree[graph.row] ** left * graph.data * degree[graph.col] ** right
    index = torch.from_numpy(np.stack([graph.row, graph.col]).astype(np.int64))
    return torch.sparse_coo_tensor(
        index, torch.from_numpy(values).float(), graph.shape, check_invariants=False
    )


class _NormalisedGraph:
    """D^-1/2 A D^-1/2 for the models that propagate over users and items."""

    interaction_matrix: sp.coo_matrix
    n_users: int
    n_items: int

    def get_norm_adj_mat(self) -> Tensor:
        """The normalised graph. Shape: (n_users + n_items, n_users + n_items), sparse."""
        graph = bipartite_graph(self.interaction_matrix, self.n_users, self.n_items)
        return scaled(graph, -0.5, -0.5)


class LightGCN(_NormalisedGraph, recbole.LightGCN):
    """He et al., LightGCN, SIGIR 2020."""


class NGCF(_NormalisedGraph, recbole.NGCF):
    """Wang et al., Neural graph collaborative filtering, SIGIR 2019."""


class GCMC(_NormalisedGraph, recbole.GCMC):
    """van den Berg et al., Graph convolutional matrix completion, 2018."""


class NCL(_NormalisedGraph, recbole.NCL):
    """Lin et al., Neighborhood-enriched contrastive learning, WWW 2022.

    Clusters by scikit-learn, as faiss does on a CPU: 25 iterations from one start. With fewer users
    or items than ``num_clusters``, each is its own cluster.
    """

    def __init__(self, config: object, dataset: object) -> None:
        super().__init__(config, dataset)
        # An epoch may begin with the clusters of the one before (m_step > 1), also after a resume.
        self.other_parameter_name += [
            "user_centroids",
            "user_2cluster",
            "item_centroids",
            "item_2cluster",
        ]

    def run_kmeans(self, x: NDArray[np.float32]) -> tuple[Tensor, Tensor]:
        """Centroids, of length 1, and the cluster of each row. Shapes: (k, D) and (n,)."""
        state = int(torch.randint(2**31, ()))
        clusters = min(self.k, len(np.unique(x, axis=0)))
        means = KMeans(clusters, n_init=1, max_iter=25, random_state=state).fit(x)
        centroids = torch.from_numpy(means.cluster_centers_).float().to(self.device)
        members = torch.from_numpy(means.labels_).long().to(self.device)
        return F.normalize(centroids, p=2, dim=1), members


class SpectralCF(recbole.SpectralCF):
    """Zheng et al., Spectral collaborative filtering, RecSys 2018."""

    def get_laplacian_matrix(self) -> Tensor:
        """I - D^-1 A. Shape: (n_users + n_items, n_users + n_items), sparse."""
        graph = bipartite_graph(self.interaction_matrix, self.n_users, self.n_items)
        return self.get_eye_mat(self.n_users + self.n_items) - scaled(graph, -1, 0)
