"""Run by a fixture as a process of its own: builds the shop's backbone and keeps feature rows."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

from PIL import Image
from torch import nn

from tests.backbone.shop import PICTURES, backbone_of, images_of


def weights_digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()


def main(pictures: Path, cache: Path) -> None:
    backbone = backbone_of()
    backbone.model.requires_grad_(False)
    backbone.trains_vision = False
    images = images_of(
        backbone,
        lambda item: Image.open(pictures / f"{item}.png"),
        lambda item: pictures / f"{item}.png",
        frozen=True,
        log=backbone.vision_log(cache),
    )
    images.rows(backbone.model, list(PICTURES))
    digest = weights_digest(backbone.model)
    print(json.dumps({"weights": digest, "fingerprint": backbone.tokenizer_fingerprint}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
