"""The families of models that can be a backbone, by the name that a description gives them."""

from recbole_mm.backbone.families.base import POOLINGS, Family, Grid, PictureSettings, Pixels
from recbole_mm.backbone.families.causal_lm import CausalLM
from recbole_mm.backbone.families.chat_lm import ChatLM
from recbole_mm.backbone.families.idefics3 import Idefics3
from recbole_mm.backbone.families.llava import Llava
from recbole_mm.backbone.families.llava_next import LlavaNext
from recbole_mm.backbone.families.qwen import Qwen2VL, Qwen25VL

FAMILIES: dict[str, type[Family]] = {
    "qwen2_vl": Qwen2VL,
    "qwen2_5_vl": Qwen25VL,
    "llava": Llava,
    "llava_next": LlavaNext,
    "idefics3": Idefics3,
    "causal_lm": CausalLM,
    "chat_lm": ChatLM,
}

__all__ = ["FAMILIES", "POOLINGS", "Family", "Grid", "PictureSettings", "Pixels"]
