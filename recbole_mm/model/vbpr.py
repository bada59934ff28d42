"""VBPR: matrix factorisation that also matches a user's taste with what an item's picture shows.

Paper: He and McAuley, "VBPR: Visual Bayesian Personalized Ranking from Implicit Feedback", AAAI
2016 (https://arxiv.org/abs/1510.01784). Official code: none that is linked there.

Differs from the paper:
- The global offset and the bias of users, which change no order of items, are left out.
- Features have mean 0 and deviation 1 (`standardize`), and items without a picture have zeros.
- All regularisation has one weight, over the rows of the batch.
"""

from __future__ import annotations

from math import inf
from pathlib import Path
from typing import Any, ClassVar

import torch
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import GeneralRecommender
from recbole.utils import InputType
from torch import Tensor, nn
from torch.nn import functional as F

from recbole_mm.data.content import ItemContent
from recbole_mm.model.layers.feature_types import FeatureReader, FeatureSettings

_STD = 0.01  # of the first weights


class VBPR(GeneralRecommender):
    """VBPR behind RecBole's interface; see the module's head.

    Attributes:
        pictures: features of the items' pictures, zeros where there is none. Shape: (V, F).
    """

    input_type = InputType.PAIRWISE
    bounds: ClassVar[dict[str, tuple[float, float]]] = {
        "visual_size": (1, inf),
        "reg_weight": (0, inf),
        "missing_image_rate": (0, 1),
    }
    pictures: Tensor

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        K, K_v = config["embedding_size"], config["visual_size"]
        self.reg_weight: float = config["reg_weight"]
        self.register_buffer("pictures", _pictures(config, dataset), persistent=False)
        width = self.pictures.shape[1]
        self.user_embedding = nn.Embedding(self.n_users, K)
        self.item_embedding = nn.Embedding(self.n_items, K)
        self.item_bias = nn.Embedding(self.n_items, 1)
        self.taste = nn.Embedding(self.n_users, K_v)  # theta
        self.looks = nn.Linear(width, K_v, bias=False)  # E
        self.appeal = nn.Linear(width, 1, bias=False)  # beta': what everybody likes to see
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=_STD)
        nn.init.zeros_(self.item_bias.weight)

    def users(self, users: Tensor) -> Tensor:
        """Both parts of some users, and a 1 for what everybody likes. (B,) -> (B, K + K' + 1)."""
        known: Tensor = self.user_embedding(users)
        ones = known.new_ones(len(known), 1)
        return torch.cat([known, self.taste(users), ones], dim=1)

    def items(self, items: Tensor) -> Tensor:
        """Items so that the products with users are equation 4. (B,) -> (B, K + K' + 1)."""
        f = self.pictures[items]  # (B, F)
        liked = self.item_bias(items) + self.appeal(f)  # (B, 1)
        return torch.cat([self.item_embedding(items), self.looks(f), liked], dim=1)

    def calculate_loss(self, interaction: Interaction) -> Tensor:
        """Minus the mean log probability that the item taken scores higher. Shape: ()."""
        users = self.users(interaction[self.USER_ID])
        taken, other = (self.items(interaction[key]) for key in (self.ITEM_ID, self.NEG_ITEM_ID))
        better = (users * (taken - other)).sum(1)  # (B,)
        squares = sum(part.square().sum(1).mean() for part in (users[:, :-1], taken, other))
        return -F.logsigmoid(better).mean() + self.reg_weight * squares

    def predict(self, interaction: Interaction) -> Tensor:
        """Scores of one item a row. Shape: (B,)."""
        users, items = (interaction[key] for key in (self.USER_ID, self.ITEM_ID))
        return (self.users(users) * self.items(items)).sum(1)

    def full_sort_predict(self, interaction: Interaction) -> Tensor:
        """Scores of all items. Shape: (B * V,)."""
        every = torch.arange(self.n_items, device=self.pictures.device)
        scores = self.users(interaction[self.USER_ID]) @ self.items(every).T  # (B, V)
        return scores.flatten()


def _pictures(config: Any, dataset: Any) -> Tensor:
    """The configured features of all items. Shape: (V, F)."""
    content = ItemContent(Path(config["data_path"]), config["dataset"], dataset.item_tokens())
    how = FeatureSettings(
        image=config["image_features"],
        text="",
        fallback="none",
        missing_rate=config["missing_image_rate"],
        standardize=config["standardize"],
        cache=Path(config["cache_dir"]),
        seed=config["seed"],
        instead="take BPR, which is this model without them",
    )
    return FeatureReader(how, content, [], config["show_progress"]).read("img").table
