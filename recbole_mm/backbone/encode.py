"""Frozen encoders: Hugging Face models that make one vector of a text or of a picture.

Two kinds are told apart by the model's configuration: two towers (CLIP, SigLIP), and everything
else with token states, which are pooled as the files of sentence-transformers beside them say. No
code of a model's repository is run, and weights are safetensors alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from recbole_mm.backbone.encoder_source import TOWERS, EncoderSource, told
from recbole_mm.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
POOLINGS = {  # by the names of sentence-transformers
    "mean_tokens": "mean",
    "cls_token": "cls",
    "max_tokens": "max",
    "lasttoken": "last",
}
_MOST_TOKENS = 512  # where neither model nor tokenizer say how many they read
_BLIND = "this encoder reads text alone"
_CHARACTERS_PER_TOKEN = 32  # text beyond this many times what is read is not even looked at


def pool(states: Tensor, mask: Tensor, how: str) -> Tensor:
    """One vector of the states of a text's tokens.

    Args:
        states: shape (B, T, D).
        mask: which tokens there are, from the left; at least one. Shape: (B, T).
        how: mean, max, cls (the first token) or last.

    Returns:
        Shape: (B, D).
    """
    if how == "cls":
        return states[:, 0]
    if how == "last":
        return states[torch.arange(len(states), device=states.device), mask.sum(1).long() - 1]
    there = mask.bool()[:, :, None]  # (B, T, 1)
    if how == "max":
        return states.masked_fill(~there, -torch.inf).amax(1)
    return states.masked_fill(~there, 0).sum(1) / there.sum(1)


class Tokens:
    """Texts as padded token ids: no text can bring a special token in, nor be too long.

    Args:
        tokenizer: of the model.
        most: tokens that the model reads; None: as many as the tokenizer says.
        full: whether texts are always padded to `most`, on the tokenizer's side.
        lower: whether texts are put in lower case first.
    """

    def __init__(
        self, tokenizer: Any, most: int | None, full: bool = False, lower: bool = False
    ) -> None:
        self.tokenizer, self.full, self.lower = tokenizer, full, lower
        said = int(min(tokenizer.model_max_length, 1 << 30))
        self.most = min(said, most) if most is not None else min(said, _MOST_TOKENS)
        self._reserved = _reserved(tokenizer)
        [plain], [whole] = (self._ids(["a"], special) for special in (False, True))
        at = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
        self._before, self._after = whole[:at], whole[at + len(plain) :]
        self._room = self.most - len(self._before) - len(self._after)
        self._left = full and tokenizer.padding_side == "left"

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids, and which of them are no padding. Shapes: (B, T)."""
        rows = self._rows(texts)
        T = self.most if self.full else max(1, *map(len, rows))
        ids = torch.full((len(rows), T), int(self.tokenizer.pad_token_id or 0))  # (B, T)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            at = slice(T - len(row), T) if self._left else slice(len(row))
            ids[i, at], mask[i, at] = torch.tensor(row), 1
        return ids, mask

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """How many tokens each text has."""
        parts = (texts[start : start + 1024] for start in range(0, len(texts), 1024))
        return [len(row) for part in parts for row in self._rows(part)]

    def _rows(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._row(ids) for ids in self._ids([self._cut(text) for text in texts], False)]

    def _cut(self, text: str) -> str:
        text = text[: self.most * _CHARACTERS_PER_TOKEN]
        return text.lower() if self.lower else text

    def _row(self, ids: list[int]) -> list[int]:
        kept = [token for token in ids if token not in self._reserved][: self._room]
        return [*self._before, *kept, *self._after]

    def _ids(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        how = {"split_special_tokens": not special, "verbose": False}
        return self.tokenizer(list(texts), add_special_tokens=special, **how)["input_ids"]


def _reserved(tokenizer: Any) -> frozenset[int]:
    """Special tokens; not the one of unknown words, unless it has another role too (CLIP)."""
    added = tokenizer.added_tokens_decoder.items()
    special = {*tokenizer.all_special_ids, *(token for token, how in added if how.special)}
    roles = ("bos", "eos", "cls", "sep", "pad", "mask")
    if all(tokenizer.unk_token_id != getattr(tokenizer, f"{role}_token_id") for role in roles):
        special.discard(tokenizer.unk_token_id)
    return frozenset(special)


class Encoder(ABC):
    """A frozen model that makes vectors.

    Attributes:
        source: its files.
        model: the Hugging Face model.
        pooling: how states became one vector, for the record.
    """

    pooling: str

    def __init__(self, source: EncoderSource, model: Any, tokens: Tokens) -> None:
        self.source, self.model, self.tokens = source, model, tokens

    @abstractmethod
    def texts(self, texts: Sequence[str]) -> Tensor:
        """A vector of each text. Shape: (B, D), float32, on the model's device."""

    @abstractmethod
    def pixels(self, image: Image.Image) -> dict[str, Tensor]:
        """An RGB picture as the model takes it: each tensor's first axis is of length 1."""

    @abstractmethod
    def look(self, pixels: Sequence[dict[str, Tensor]]) -> Tensor:
        """A vector of each of those. Shape: (B, D), float32, on the model's device."""

    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """A vector of each RGB picture. Shape: (B, D), float32, on the model's device."""
        return self.look([self.pixels(image) for image in images])

    def width(self, field: str) -> int:
        """D of ``text`` or ``image``."""
        blank = Image.new("RGB", (64, 64))
        return (self.texts(["a"]) if field == "text" else self.images([blank])).shape[1]


class TextModel(Encoder):
    """A model of token states, such as BERT, MPNet or T5's encoder.

    Raises:
        UserError: the files of sentence-transformers ask for what is not known here.
    """

    def __init__(self, source: EncoderSource, model: Any, tokens: Tokens) -> None:
        super().__init__(source, model, tokens)
        self.states = model.get_encoder() if model.config.is_encoder_decoder else model
        self.how, self.normalize = _recipe(source)
        self.pooling = f"{self.how}, normalized" if self.normalize else self.how

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        ids, mask = (part.to(self.model.device) for part in self.tokens(texts))
        states = self.states(input_ids=ids, attention_mask=mask).last_hidden_state  # (B, T, D)
        rows = pool(states.float(), mask, self.how)
        return F.normalize(rows, dim=1) if self.normalize else rows

    def pixels(self, image: Image.Image) -> dict[str, Tensor]:
        raise ValueError(_BLIND)

    def look(self, pixels: Sequence[dict[str, Tensor]]) -> Tensor:
        raise ValueError(_BLIND)


class TwoTowers(Encoder):
    """CLIP or SigLIP: vectors of texts and pictures in one space, not normalised."""

    pooling = "pooler"

    def __init__(self, source: EncoderSource, model: Any, tokens: Tokens) -> None:
        import transformers

        super().__init__(source, model, tokens)
        # the image processors that need no torchvision
        name = {"clip": "CLIP", "siglip": "Siglip", "siglip2": "Siglip2"}[source.kind]
        processor = getattr(transformers, f"{name}ImageProcessorPil")
        self.processor = processor.from_pretrained(source.place, **source.where)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        ids, mask = (part.to(self.model.device) for part in self.tokens(texts))
        keys = {} if self.tokens.full else {"attention_mask": mask}  # SigLIP looks at padding too
        return _vector(self.model.get_text_features(input_ids=ids, **keys))

    def pixels(self, image: Image.Image) -> dict[str, Tensor]:
        return dict(self.processor(images=[image], return_tensors="pt"))

    @torch.no_grad()
    def look(self, pixels: Sequence[dict[str, Tensor]]) -> Tensor:
        batch = {key: torch.cat([one[key] for one in pixels]) for key in pixels[0]}
        for key, part in batch.items():
            dtype = self.model.dtype if part.is_floating_point() else part.dtype
            batch[key] = part.to(self.model.device, dtype)
        return _vector(self.model.get_image_features(**batch))


def _vector(found: Any) -> Tensor:
    return (found if isinstance(found, Tensor) else found.pooler_output).float()


def _recipe(source: EncoderSource) -> tuple[str, bool]:
    """Pooling, and whether its vectors are normalised; mean where no file says anything."""
    modules = source.json("modules.json")
    if modules is None:
        return "mean", False
    kinds = [module["type"].rpartition(".")[2] for module in modules]
    if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]):
        raise UserError(
            f"Encoder '{source.name}' is made of {', '.join(kinds)}; known here are Transformer, "
            "Pooling and Normalize, in this order: take another encoder."
        )
    config = source.json(f"{modules[1]['path']}/config.json") or {}
    asked = [key for key, value in config.items() if key.startswith("pooling_mode_") and value]
    modes = [key.removeprefix("pooling_mode_") for key in asked] or [config.get("pooling_mode")]
    known = {**POOLINGS, **{how: how for how in POOLINGS.values()}}
    if len(modes) != 1 or modes[0] not in known:
        raise UserError(
            f"Encoder '{source.name}' pools by {' and '.join(map(str, modes))}; known here is one "
            f"of {', '.join(POOLINGS)}: take another encoder."
        )
    return known[modes[0]], kinds[-1] == "Normalize"


def load_encoder(source: EncoderSource, device: str = "auto", dtype: str = "auto") -> Encoder:
    """Loads an encoder, frozen.

    Args:
        source: as `find_encoder` gives it.
        device: auto (a GPU where there is one), cpu, cuda, …
        dtype: of the weights; auto is bfloat16 on a GPU and float32 elsewhere.

    Raises:
        UserError: files are missing, weights are not safetensors, the device is not there, or
            vectors are made in a way that is not known here.
    """
    place = _device(device)
    if dtype == "auto":
        dtype = "bfloat16" if place.type == "cuda" else "float32"
    with told(source.name, source.place):
        model = _model(source, DTYPES[dtype]).to(place)
        kind = TwoTowers if source.kind in TOWERS else TextModel
        return kind(source, model, _tokens(source, model))


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"Device '{name}' is not there: take auto or cpu.") from error


def _model(source: EncoderSource, dtype: torch.dtype) -> Any:
    from transformers import AutoModel

    model, found = AutoModel.from_pretrained(
        source.place, **source.where, dtype=dtype, use_safetensors=True, output_loading_info=True
    )
    # transformers fills these with random numbers; BERT's own pooler is not used here
    lost = [key for key in found["missing_keys"] if not key.startswith("pooler.")]
    if lost := [*lost, *found["mismatched_keys"]]:
        raise ValueError(f"no weights of {lost[0]}")
    return model.eval().requires_grad_(False)


def _tokens(source: EncoderSource, model: Any) -> Tokens:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.place, **source.where)
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if source.kind in TOWERS:
        return Tokens(tokenizer, most, full=source.kind != "clip")
    table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    pad = getattr(table, "padding_idx", None)
    if most is not None and pad is not None:
        most -= pad + 1  # RoBERTa and MPNet count positions from there
    settings = source.json("sentence_bert_config.json") or {}
    limits = [n for n in (most, settings.get("max_seq_length")) if n is not None]
    lower = bool(settings.get("do_lower_case"))
    return Tokens(tokenizer, min(limits, default=None), lower=lower)
