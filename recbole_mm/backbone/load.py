"""Loads a backbone: a Hugging Face model with its tokenizer, quantised and adapted as asked for.

The classes are those of `transformers`; no modelling code is copied and no `AutoProcessor` is used,
so that torchvision is not needed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recbole_mm.backbone.batch import PromptBatch, collate
from recbole_mm.backbone.families import FAMILIES, POOLINGS, Family, PictureSettings
from recbole_mm.backbone.hub import is_online, require
from recbole_mm.backbone.prompt import Fork, TextEncoder
from recbole_mm.backbone.tiny import TinySizes, build, fingerprint, train_tokenizer
from recbole_mm.backbone.vision import FeatureLog, ItemImages
from recbole_mm.errors import UserError, nearest

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Keys of a description that a run may set by themselves; a backbone's YAML has them in `settings:`.
RUN_KEYS = (
    "dtype",
    "quantize",
    "attention",
    "min_pixels",
    "max_pixels",
    "image_pooling",
    "gradient_checkpointing",
    "lora_targets",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
)
_DECIDES = {".safetensors", ".json", ".jinja", ".model", ".txt"}
_QUANTIZE = ("none", "nf4")
_ATTENTION = ("auto", "sdpa", "eager", "flash_attention_2")


@dataclass(frozen=True)
class BackboneSpec:
    """A backbone's description: the YAML file in `properties/backbone/`, key by key.

    Attributes:
        name: as the user wrote it; goes into the result.
        family: which entry of `FAMILIES`.
        model: Hugging Face id or local folder.
        revision: commit, branch or tag; None: the newest.
        dtype: of the frozen weights: float32, bfloat16 or float16.
        quantize: none or nf4 (never the vision tower, never the language model head).
        attention: auto, sdpa, eager or flash_attention_2.
        min_pixels: smallest picture after resizing, in pixels.
        max_pixels: largest picture after resizing, in pixels.
        image_pooling: all rows of a picture, or cls: one, see `PictureFamily`.
        lora_targets: names of the language model's Linears that get adapters, or ``all``.
        lora_r: rank of the adapters; 0 trains no adapters but all weights.
        lora_alpha: their scale is alpha / r.
        lora_dropout: on their input.
        gradient_checkpointing: trade time for memory.
        is_tiny: the tiny form of the family instead of the weights of `model`.
        tiny: its sizes.
    """

    name: str
    family: str
    model: str
    min_pixels: int = 56 * 56
    max_pixels: int = 168 * 168
    image_pooling: str = "all"
    revision: str | None = None
    dtype: str = "bfloat16"
    quantize: str = "none"
    attention: str = "auto"
    lora_targets: Sequence[str] = ("all",)
    lora_r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.05
    gradient_checkpointing: bool = False
    is_tiny: bool = False
    tiny: Mapping[str, int] | None = None

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> BackboneSpec:
        """A checked description.

        Raises:
            UserError: an unknown key or value; names the nearest known one.
        """
        known = {field.name for field in fields(cls)}
        for key in mapping:
            if key not in known:
                raise UserError(
                    f"backbone {mapping.get('name')}: no key '{key}'{nearest(key, known)}."
                )
        spec = cls(**mapping)
        for key, value, allowed in (
            ("family", spec.family, FAMILIES),
            ("dtype", spec.dtype, _DTYPES),
            ("quantize", spec.quantize, _QUANTIZE),
            ("attention", spec.attention, _ATTENTION),
            ("image_pooling", spec.image_pooling, POOLINGS),
        ):
            if value not in allowed:
                raise UserError(f"{key} is '{value}': it is one of {', '.join(allowed)}.")
        return spec

    def pictures(self) -> PictureSettings:
        """How pictures are taken."""
        return PictureSettings(self.min_pixels, self.max_pixels, self.image_pooling)


class Backbone(nn.Module):
    """A loaded model that reads prompts.

    Attributes:
        name: of the backbone, for the result.
        model: the Hugging Face model, adapters in it.
        family: what its family does its own way.
        encoder: text to token ids.
        trains_vision: whether the vision tower is trained.
        tokenizer_fingerprint: SHA-256 of what decides the ids of a text.
    """

    def __init__(self, spec: BackboneSpec, model: Any, tokenizer: Any) -> None:
        super().__init__()
        self.name, self.spec, self.model = spec.name, spec, model
        self.tokenizer = tokenizer
        self.encoder = TextEncoder(tokenizer)
        self.family: Family = FAMILIES[spec.family](tokenizer, model.config, spec.pictures())
        self.family.speed_up(model)
        tower = self.family.vision_tower(model)
        self.trains_vision = tower is not None and any(p.requires_grad for p in tower.parameters())
        self.tokenizer_fingerprint = fingerprint(tokenizer)
        pad = tokenizer.pad_token_id  # Llama has none; what stands in padding is never looked at
        self.pad_id = int(tokenizer.eos_token_id if pad is None else pad)

    @property
    def head(self) -> nn.Module:
        """The language model head. (…, D) -> (…, vocabulary)."""
        model: Any = self.model
        return model.get_output_embeddings()

    @property
    def context(self) -> int | None:
        """Tokens that it was made to read; None where its configuration does not say."""
        model: Any = self.model
        return getattr(model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def vision_log(self, cache: Path) -> FeatureLog | None:
        """Where a frozen tower's rows are kept below `cache`; None for a trained tower or none."""
        model: Any = self.model
        tower = self.family.vision_tower(model)
        if self.trains_vision or tower is None:
            return None
        width = model.get_input_embeddings().weight.shape[1]
        dtype = next(tower.parameters()).dtype
        spec = self.spec
        parts = [
            spec.model,
            spec.min_pixels,
            spec.max_pixels,
            spec.image_pooling,
            str(dtype),
            width,
        ]
        if Path(spec.model).is_dir():
            parts += model_files(spec.model)
        else:
            parts.append(commit_of(spec) or spec.revision)
        key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
        return FeatureLog(cache / f"vision-{key}", width, dtype)

    def hidden(self, batch: PromptBatch, images: ItemImages, positions: int = 1) -> Tensor:
        """Final hidden states of the last `positions` tokens of each prompt, in one forward pass.

        Args:
            batch: padded prompts.
            images: where the rows of the batch's image items come from.
            positions: S, tokens to read from the end of each prompt.

        Returns:
            Shape: (B, S, D).
        """
        batch = batch.to(self.device)
        states = self.run(batch, images).last_hidden_state  # (B, T, D)
        back = torch.arange(positions - 1, -1, -1, device=states.device)
        at = batch.last[:, None] - back  # (B, S)
        return states.gather(1, at[:, :, None].expand(-1, -1, states.shape[2]))  # (B, S, D)

    def branch_hidden(self, forks: Sequence[Fork], images: ItemImages) -> Tensor:
        """Final hidden states at the end of every branch; each trunk is computed once.

        Args:
            forks: all of S branches.
            images: where the rows of their image items come from.

        Returns:
            Shape: (B, S, D).
        """
        return self.ends(forks, images).unflatten(0, (len(forks), len(forks[0].branches)))

    def ends(self, forks: Sequence[Fork], images: ItemImages) -> Tensor:
        """The same of forks of any number of branches, one fork behind the other. (n, D)."""
        trunk = collate([fork.trunk for fork in forks], self.pad_id, left=True).to(self.device)
        branch = collate([b for fork in forks for b in fork.branches], self.pad_id).to(self.device)
        lengths = torch.tensor([len(fork.trunk) for fork in forks], device=self.device)
        counts = torch.tensor([len(fork.branches) for fork in forks], device=self.device)
        owner = torch.arange(len(forks), device=self.device).repeat_interleave(counts)  # (n,)
        T = trunk.ids.shape[1]
        real = torch.arange(T, device=self.device) >= T - lengths[:, None]  # (B, T)
        cache = self.run(trunk, images, attention_mask=real.long(), use_cache=True).past_key_values
        cache.batch_select_indices(owner)
        seen = torch.cat([real[owner], torch.ones_like(branch.ids).bool()], 1)
        states = self.run(
            branch, images, attention_mask=seen.long(), past_key_values=cache, use_cache=True
        ).last_hidden_state  # (n, T', D)
        return states[torch.arange(len(states), device=states.device), branch.last]

    def run(self, batch: PromptBatch, images: ItemImages, **more: Any) -> Any:
        """One pass of the language model over a batch that is on its device.

        Args:
            batch: padded prompts, or what follows those in `past_key_values`.
            images: where the rows of the batch's image items come from.
            more: what the language model takes besides, such as `attention_mask`.
        """
        language_model = self.family.language_model(self.model)
        keys = {"use_cache": False, **more}
        positions = batch.positions.squeeze(0)  # (A, B, T), or (B, T) where there is one axis
        return language_model(
            inputs_embeds=self._embed(batch, images), position_ids=positions, **keys
        )

    def _embed(self, batch: PromptBatch, images: ItemImages) -> Tensor:
        """Token embeddings with image rows in their slots. Shape: (B, T, D)."""
        model: Any = self.model
        embeds: Tensor = model.get_input_embeddings()(batch.ids)  # (B, T, D)
        if not batch.items:
            return embeds
        rows = torch.cat(images.rows(self.model, batch.items)).to(embeds)  # (n distinct, D)
        flat = embeds.flatten(0, 1)  # (B * T, D)
        return flat.index_copy(0, batch.image_at, rows[batch.image_row]).view_as(embeds)


def model_files(model: str) -> list[tuple[str, int, int]]:
    """Path, size and time of each file of a local folder that decides what a model reads and says:
    weights, tokenizer, chat template, settings; none for a name of the hub."""
    if not Path(model).is_dir():
        return []
    files = sorted(f for f in Path(model).resolve().iterdir() if f.suffix in _DECIDES)
    return [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]


def commit_of(spec: BackboneSpec) -> str | None:
    """The commit of the hub that `spec` names now; None for a local folder, a tiny form, or where
    the model is neither cached nor reachable."""
    if spec.is_tiny or Path(spec.model).is_dir():
        return None
    require("transformers")
    from transformers.utils import cached_file

    try:
        found = cached_file(spec.model, "config.json", **_where(spec))
    except (OSError, ValueError):
        return None
    folder = Path(found).parent if found else Path()
    return folder.name if folder.parent.name == "snapshots" else None  # as the hub's cache lies


def check_template(spec: BackboneSpec) -> None:
    """Reads the tokenizer of a backbone that is loaded later, where it is at hand.

    Raises:
        UserError: it has no chat template, and the backbone's family asks for one.
    """
    family: Any = FAMILIES[spec.family]
    if spec.is_tiny or not family.asks_template:
        return
    require("transformers")
    from transformers import AutoTokenizer

    with suppress(OSError, ValueError):
        family.check(AutoTokenizer.from_pretrained(spec.model, **_where(spec)))


def _where(spec: BackboneSpec) -> dict[str, Any]:
    """Which commit `transformers` takes, and whether it asks the hub."""
    return {
        "revision": spec.revision or "main",
        "local_files_only": not is_online(spec.model),
    }


def load_backbone(
    spec: BackboneSpec,
    texts: Iterable[str],
    fixed: Iterable[str],
    seed: int,
    *,
    adapt: bool = True,
) -> Backbone:
    """Loads, or for a tiny backbone builds, what `spec` describes.

    Args:
        spec: the description.
        texts: the dataset's own texts, of which a tiny backbone's tokenizer is trained.
        fixed: texts of the prompt template, likewise.
        seed: of a tiny backbone's weights, and of new adapters.
        adapt: whether it is to be trained; if not, all weights are frozen as they are.

    Raises:
        UserError: a package is missing, or the weights can be neither found nor fetched.
    """
    require("transformers", "tokenizers")
    if spec.is_tiny:
        sizes = TinySizes(**(spec.tiny or {}))
        family = FAMILIES[spec.family]
        special = "|".join(map(re.escape, family.special_tokens))
        chat = re.sub(special, "", family.chat_head + family.chat_tail)
        tokenizer = train_tokenizer(family, texts, [chat, *fixed], sizes.vocab_size)
        model = build(family, sizes, tokenizer, seed, _attention(spec))
        return Backbone(spec, model.requires_grad_(adapt), tokenizer)
    model, tokenizer = _pretrained(spec)
    if adapt:
        add_adapters(model, spec, seed)
    else:
        model.requires_grad_(False)
    return Backbone(spec, model, tokenizer)


def _attention(spec: BackboneSpec) -> str:
    """The attention implementation to ask for, given what is installed."""
    usable = torch.cuda.is_available() and importlib.util.find_spec("flash_attn") is not None
    usable = usable and spec.dtype != "float32" and not spec.is_tiny
    if spec.attention == "flash_attention_2" and not usable:
        raise UserError(
            "attention is flash_attention_2, which needs a CUDA GPU, the package flash-attn and "
            "16-bit weights: set attention to auto or sdpa."
        )
    return (
        ("flash_attention_2" if usable else "sdpa") if spec.attention == "auto" else spec.attention
    )


def _pretrained(spec: BackboneSpec) -> tuple[Any, Any]:
    from safetensors import SafetensorError
    from transformers import AutoTokenizer

    where = _where(spec)
    where["revision"] = commit_of(spec) or where["revision"]  # `main` may move meanwhile
    settings: dict[str, Any] = {
        "dtype": _DTYPES[spec.dtype],
        "attn_implementation": _attention(spec),
    }
    if spec.quantize == "nf4":
        settings["quantization_config"] = _nf4(spec)
    try:
        model, found = (
            FAMILIES[spec.family]
            .model_class()
            .from_pretrained(
                spec.model,
                **where,
                **settings,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        )
        # transformers fills these with random numbers
        if lost := [*found["missing_keys"], *found["mismatched_keys"]]:
            raise ValueError(f"no weights of {lost[0]}")
        tokenizer = AutoTokenizer.from_pretrained(spec.model, **where)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"The weights of backbone '{spec.name}' ({spec.model}) are neither cached nor "
            "reachable, or are incomplete: choose --backbone=tiny, which needs none, or "
            "--backbone=FOLDER, a local folder with the weights and the tokenizer."
        ) from error
    return model, tokenizer


def _nf4(spec: BackboneSpec) -> Any:
    require("bitsandbytes", "accelerate")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=_DTYPES[spec.dtype],
        llm_int8_skip_modules=list(FAMILIES[spec.family].frozen_parts),
    )


def add_adapters(model: Any, spec: BackboneSpec, seed: int) -> None:
    """Freezes the model and puts adapters on Linears of the language model, in fp32.

    Args:
        model: the Hugging Face model.
        spec: which adapters; with `lora_r` 0 the model is left as it is.
        seed: of their weights.

    Raises:
        UserError: quantised weights without adapters, or no such Linears.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _adapt(model, spec)


def _adapt(model: Any, spec: BackboneSpec) -> None:
    if spec.lora_r == 0:
        if spec.quantize != "none":
            raise UserError(
                "lora_r is 0: quantised weights cannot be trained, set lora_r or quantize: none."
            )
        return
    require("peft")
    from peft import LoraConfig, inject_adapter_in_model

    model.requires_grad_(False)
    config = LoraConfig(
        r=spec.lora_r,
        lora_alpha=int(spec.lora_alpha),
        lora_dropout=spec.lora_dropout,
        target_modules=_targets(model, spec),
        init_lora_weights="gaussian",
    )
    inject_adapter_in_model(config, model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if spec.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})


def _targets(model: nn.Module, spec: BackboneSpec) -> list[str]:
    """Paths of the Linears that get adapters."""
    skipped = FAMILIES[spec.family].frozen_parts
    linears = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(skipped)
    ]
    names = {name.rpartition(".")[2] for name in linears}
    wanted = names if list(spec.lora_targets) == ["all"] else set(spec.lora_targets)
    if not wanted or (unknown := sorted(wanted - names)):
        raise UserError(
            f"lora_targets: the language model of backbone '{spec.name}' has no Linear "
            f"{', '.join(unknown) if wanted else 'in an empty list'}: use all or some of "
            f"{', '.join(sorted(names))}."
        )
    return [name for name in linears if name.rpartition(".")[2] in wanted]
