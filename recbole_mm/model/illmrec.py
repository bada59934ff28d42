"""I-LLMRec: a user's items as single image tokens in the prompt of a frozen language model.

Paper: Kim et al., "Image is All You Need: Towards Efficient and Effective Large Language
Model-Based Recommender Systems", 2025 (https://arxiv.org/abs/2503.06238; at ICLR 2026 as
"Token-Efficient Item Representation via Images for LLM Recommender Systems"). Official code:
https://github.com/rlqja1107/torch-I-LLMRec.

Differs from the official code:
- Alignment and retrieval are one forward pass: both branches stand behind one history and do not
  see each other. They share its wording; the code writes two prompts, one of them a chat.
- Of an answer only the value is learnt (`ila_loss_on: value`); the words before it are the same for
  all items. A property that an item lacks is not asked for, and a category is its last part.
- The language model's own embeddings stay frozen (`train_token_emb`), as the paper says.
- All feature types share their negatives, and their losses are added (equation 7); the code draws
  anew for each type and takes the mean.
- Trained weights are float32 whatever the frozen ones are, and are chosen on validation data.
- Features have mean 0 and deviation 1 (`standardize`); there they are taken as they come.
- A window a user and epoch ends anywhere and is as long as at evaluation (`train_window`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import SequentialRecommender
from torch import Tensor

from recbole_mm.data.content import ItemContent
from recbole_mm.data.windows import WINDOWS
from recbole_mm.errors import UserError
from recbole_mm.model.layers.descriptions import descriptions_of
from recbole_mm.model.layers.feature_types import (
    TYPES,
    FeatureReader,
    Features,
    FeatureSettings,
    rows_of,
)
from recbole_mm.model.layers.id_vectors import item_table
from recbole_mm.model.layers.image_prompts import (
    REPRESENTATIONS,
    ImagePrompts,
    PromptSettings,
    Properties,
    Question,
)
from recbole_mm.model.layers.image_reader import TRAIN_LLM, ImageReader
from recbole_mm.model.layers.image_stage import NEG_EXCLUDE, ImageStage, ImageTuning
from recbole_mm.model.layers.kept_vectors import KeptVectors
from recbole_mm.model.layers.questions import PROPERTIES
from recbole_mm.model.layers.retrieval_heads import ACTIVATIONS
from recbole_mm.model.layers.retriever_stage import RetrieverStage, TrainingRows
from recbole_mm.registry import get_model
from recbole_mm.stage import Readout, Stage, StageSettings

Ints = NDArray[np.int64]
_ITEMS_AT_ONCE = 4096


class ILLMRec(SequentialRecommender):
    """I-LLMRec behind RecBole's interface; see the module's head.

    Attributes:
        cf: any sequential model whose scores are products of vectors.
        reader: what is trained beside it, or None when no stage needs it.
        prompts: of the dataset's items, or None without a language model.
        features: by type; those of ``cf`` come with `take_cf`.
        active: whose scores are read: ``cf`` or ``alignment``.
        aligns: whether there is anything that alignment (ILA) could train.
        backbone_name: for the result.
    """

    inner_model = "cf"  # the key that names it; its YAML stands below this one's
    choices: ClassVar[dict[str, tuple[str, ...]]] = {
        "item_repr": tuple(REPRESENTATIONS),
        "train_llm": TRAIN_LLM,
        "train_window": WINDOWS,
        "adaptor_act": tuple(ACTIVATIONS),
        "ila_loss_on": ("value", "full"),
        "ire_reduction": ("sum", "mean"),
        "neg_exclude": NEG_EXCLUDE,
    }
    bounds: ClassVar[dict[str, tuple[float, float]]] = {
        "missing_image_rate": (0, 1),
        "ila_weight": (0, inf),
        "two_stage": (0, inf),
        **dict.fromkeys(("max_attr_tokens", "max_description_tokens", "max_context"), (1, inf)),
        **dict.fromkeys(("adaptor_hidden", "head_hidden", "d_s"), (1, inf)),
        **dict.fromkeys(("n_neg", "score_tokens", "max_history"), (1, inf)),
        **dict.fromkeys(("summary_tokens", "generate_tokens"), (1, inf)),
        "description_noise": (0, inf),
    }
    stage_names = ("cf", "alignment")

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        _check(config)
        self.seed: int = config["seed"]
        self.active = "cf"
        self.training_rows = TrainingRows.of(config)
        self.cf: Any = get_model(config["cf"])(config, dataset)
        self.tuning = ImageTuning.of(config)
        self.max_history: int = config["max_history"]
        self.standardize: bool = config["standardize"]
        self.packed: bool = config["packed"]
        self.tokens_at_once: int = config["score_tokens"]
        self._items: Tensor | None = None
        self._users_kept = KeptVectors()
        self.reader: ImageReader | None = None
        self.prompts: ImagePrompts | None = None
        self.aligns, self.backbone_name = False, None
        if list(config["stages"] or self.stage_names) != ["cf"]:
            self._build(config, dataset)

    def _build(self, config: Any, dataset: Any) -> None:
        """Features, the language model and its prompts, and what is trained."""
        content = ItemContent(Path(config["data_path"]), config["dataset"], dataset.item_tokens())
        properties = Properties(content, config["columns"])
        wanted, how = list(config["ire_features"]), PromptSettings.of(config)
        self.slot_type = how.slot_type if config["use_llm"] else None
        self.features = _features(config, content, properties, {*wanted, self.slot_type})
        cf_width = item_table(self.cf, self.n_items, "cf").weight.shape[1]
        widths = {kind: f.width for kind, f in self.features.items()} | {"cf": int(cf_width)}
        language_model, self.fingerprint = None, ""
        if config["use_llm"]:  # features above are of the columns, whatever prompts say
            properties.descriptions = descriptions_of(config, content, properties.texts())
            backbone = _backbone(config, properties, how)
            self.prompts = ImagePrompts(how, properties, backbone, self._has_vector)
            self.backbone_name, self.pad_id = backbone.name, backbone.pad_id
            self.fingerprint = backbone.tokenizer_fingerprint
            language_model = backbone.model
        slot_width = widths.get(str(self.slot_type))
        of_types = {kind: widths[kind] for kind in wanted}
        self.reader = ImageReader(language_model, of_types, slot_width, config)
        learns = slot_width or config["train_token_emb"] or config["train_llm"] != "frozen"
        asks = self.prompts is not None and self.prompts.has_questions(self.n_items)
        self.aligns = bool(asks and learns and config["ila_weight"] > 0)
        if config["two_stage"] and not self.aligns:
            raise UserError(
                f"two_stage is {config['two_stage']}, but there is nothing to align: set it to 0."
            )

    def _has_vector(self, item: int) -> bool:
        return self.slot_type != "img" or bool(self.features["img"].known[item])

    # --- stages ----------------------------------------------------------------------
    def enter(self, stage_name: str) -> None:
        """Scores are now those of this stage."""
        self.active = stage_name

    def make_stages(self, settings: Mapping[str, StageSettings], train_dataset: Any) -> list[Stage]:
        """The stages in order, on the training part of a dataset."""
        rows = self.training_rows
        stages: list[Stage] = [RetrieverStage("cf", self.cf, settings["cf"], rows, train_dataset)]
        if self.reader is not None:
            how = settings["alignment"]
            stages.append(ImageStage("alignment", self, how, self.tuning, train_dataset))
        return stages

    def readouts(self, last_stage: str) -> list[Readout]:
        """The rows of the result, once the stages up to `last_stage` are in place."""
        rows = [Readout("cf", lambda: self.enter("cf"), chosen=last_stage == "cf")]
        if last_stage == "alignment":
            rows.append(Readout("alignment", lambda: self.enter("alignment")))
        return rows

    def take_cf(self, table: Tensor, warm: Tensor) -> None:
        """The item table of the trained CF model is this. Shapes: (V, D), (V,)."""
        every = {**self.features, "cf": Features(table, warm)}
        self.features = {kind: found.to(self.device) for kind, found in every.items()}
        self.forget()

    def forget(self) -> None:
        """To be called when weights have changed: users and items are projected once as long as
        they have not."""
        self._items = None
        self._users_kept.forget()

    # --- what is read ----------------------------------------------------------------
    def questions(self, targets: Ints, rng: np.random.Generator) -> list[Question | None]:
        """A question about each target, or None."""
        prompts = self._prompts()
        return [prompts.question(target, rng) for target in targets.tolist()]

    def read(
        self,
        histories: Sequence[Ints],
        asked: Sequence[Question | None] | None = None,
        states: bool = True,
        train_adaptor: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Users' states, and the mean cross entropy of the answers.

        Args:
            histories: item ids, oldest first.
            asked: a question for each; None: there is none.
            states: whether states are wanted.
            train_adaptor: whether the gradient goes on to the adaptor.

        Returns:
            Shapes: (B, width), or (0, width) where they are not wanted, and ().
        """
        reader = self._reader()
        if reader.language_model is None:
            return self._means(histories), torch.zeros((), device=self.device)
        told = torch.zeros((), device=self.device)
        found = [torch.zeros(0, reader.language_model.width, device=self.device)]
        for rows in self._prompts().passes(histories, asked, states, self.packed):
            part, loss = reader(*self._collate(rows), train_adaptor)
            found.append(part)
            told = told + loss
        return torch.cat(found), told

    def _collate(self, rows: Sequence[Any]) -> tuple[Any, Tensor]:
        """A batch and the features of its slots. Shape of the latter: (n, width)."""
        from recbole_mm.backbone.slots import collate_packed

        batch = collate_packed(rows, self.pad_id).to(self.device)
        if self.slot_type is None:
            return batch, torch.zeros(0, 1, device=self.device)
        return batch, self.features[self.slot_type].table[batch.keys]

    def _means(self, histories: Sequence[Ints]) -> Tensor:
        """Of the features of each history's items, all types side by side. Shape: (B, width)."""
        tables = [self.features[kind].table for kind in self._reader().heads.types]
        table = torch.cat(tables, dim=1)  # (V, width)
        return torch.stack([table[torch.from_numpy(h)].mean(0) for h in histories])

    def project(self, items: Tensor) -> Tensor:
        """Items in the spaces of all feature types. (n,) -> (n, types, d_s)."""
        heads = self._reader().heads
        tables = {kind: self.features[kind] for kind in heads.types}
        found: Tensor = heads.items(rows_of(tables, items.to(self.device)))
        return found

    # --- scores ----------------------------------------------------------------------
    @torch.no_grad()
    def full_sort_predict(self, interaction: Interaction) -> Tensor:
        """Scores of all items. Shape: (B, V)."""
        if self.active == "cf":
            found: Tensor = self.cf.full_sort_predict(interaction)
            return found.view(len(interaction), -1)
        return self._users(self.histories(interaction)) @ self._item_vectors().T  # equation 8

    @torch.no_grad()
    def predict(self, interaction: Interaction) -> Tensor:
        """Scores of one item a row. Shape: (B,)."""
        items = interaction[self.ITEM_ID]
        return self.full_sort_predict(interaction).gather(1, items[:, None])[:, 0]

    def histories(self, interaction: Interaction) -> list[Ints]:
        """The newest items of each row, oldest first."""
        items = interaction[self.ITEM_SEQ].cpu().numpy()
        ends = interaction[self.ITEM_SEQ_LEN].cpu().numpy()
        first = np.maximum(ends - self.max_history, 0)
        return [row[a:b] for row, a, b in zip(items, first, ends, strict=True)]

    def _users(self, histories: Sequence[Ints]) -> Tensor:
        """A vector for each; equal histories are read once, until weights change. (B, H)."""
        return self._users_kept.of(histories, self._encoded)

    def _encoded(self, histories: list[Ints]) -> Tensor:
        """In batches of like length. (n, H)"""
        from recbole_mm.backbone.batch import by_length

        lengths = [len(history) for history in histories]
        if self.prompts is not None:
            lengths = [len(self.prompts.trunk(history.tolist())) for history in histories]
        groups = list(by_length(lengths, self.tokens_at_once))
        states = [self.read([histories[row] for row in rows])[0] for rows in groups]
        vectors = self._reader().heads.users(torch.cat(states)).flatten(1)  # (n, types * d_s)
        order = torch.tensor([row for rows in groups for row in rows], device=vectors.device)
        return vectors[order.argsort()]

    def _item_vectors(self) -> Tensor:
        """Of all items. Shape: (V, types * d_s)."""
        if self._items is None:
            parts = torch.arange(self.n_items).split(_ITEMS_AT_ONCE)
            self._items = torch.cat([self.project(part).flatten(1) for part in parts])
        return self._items

    def _reader(self) -> ImageReader:
        if self.reader is None:
            raise UserError("stages is 'cf' alone: add alignment to stages.")
        return self.reader

    def _prompts(self) -> ImagePrompts:
        if self.prompts is None:
            raise ValueError("use_llm is False: there are no prompts")
        return self.prompts


def _check(config: Any) -> None:
    """Raises `UserError` for keys that do not go together."""
    for key, known in (("ire_features", TYPES), ("ila_properties", PROPERTIES)):
        named = list(config[key] or [])
        if [name for name in named if name not in known] or (key == "ire_features" and not named):
            raise UserError(f"{key} is {named}: name some of {', '.join(known)}.")
    described = config["backbone_spec"]
    if config["use_llm"] and described["family"] != "causal_lm":
        raise UserError(
            f"--backbone={described['name']} is no language model of text alone: take one of the "
            "family causal_lm, such as sheared-llama-2.7b."
        )
    if config["attention"] == "flash_attention_2":
        raise UserError("attention is flash_attention_2, which takes no block mask: set sdpa.")
    if config["quantize"] not in (None, "none") and config["train_llm"] != "lora":
        raise UserError("quantize needs train_llm: lora: set that, or quantize: none.")
    if config["gradient_checkpointing"] and config["train_llm"] != "lora":
        raise UserError("gradient_checkpointing needs train_llm: lora: leave it off.")


def _features(
    config: Any, content: ItemContent, properties: Properties, kinds: set[str | None]
) -> dict[str, Features]:
    """Those of pictures and texts, as far as they are wanted."""
    how = FeatureSettings.of(config)
    texts = [properties.everything(item) for item in range(len(content.item_tokens))]
    reader = FeatureReader(how, content, texts, config["show_progress"])
    return {kind: reader.read(kind) for kind in ("img", "text") if kind in kinds}


def _backbone(config: Any, properties: Properties, how: PromptSettings) -> Any:
    """The language model, with adapters where they are asked for."""
    from recbole_mm.backbone.load import RUN_KEYS, BackboneSpec, add_adapters, load_backbone

    own = {key: config[key] for key in RUN_KEYS if config[key] is not None}
    own["lora_r"] = own.get("lora_r", 8) if config["train_llm"] == "lora" else 0
    if own.get("attention", "auto") == "auto":
        own["attention"] = "sdpa"  # takes a block mask
    spec = BackboneSpec.from_mapping({**config["backbone_spec"], **own})
    items = range(1, len(properties.content.item_tokens))
    texts = [properties.text(item, name) for name in PROPERTIES for item in items]
    fixed = how.fixed_text(how.style(properties))
    backbone = load_backbone(spec, filter(None, texts), fixed, config["seed"])
    if spec.is_tiny and spec.lora_r:
        add_adapters(backbone.model, spec, config["seed"])
    return backbone
