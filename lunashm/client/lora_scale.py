"""By how much a LoRA's factors are scaled where their file has no alpha for each layer. Knows PEFT's configuration.

PEFT keeps alpha in ``adapter_config.json`` beside the file, diffusers (from 0.34) the same fields as JSON in the
file's metadata, under ``lora_adapter_metadata``, each with its component before it: ``unet.lora_alpha``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lunashm.client.lora_file import Factors, LoraFile
from lunashm.errors import InvalidLora

METADATA_KEY = "lora_adapter_metadata"
CONFIG_NAME = "adapter_config.json"
PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class _Rule:
    """``patterns`` are regular expressions for the ends of layer names, the first that matches counts."""

    alpha: float
    patterns: Mapping[str, float] = field(default_factory=dict)
    by_root: bool = False

    def scale(self, layer: str, rank: int) -> float:
        matching = (alpha for pattern, alpha in self.patterns.items() if re.match(rf"(.*\.)?({pattern})$", layer))
        return next(matching, self.alpha) / (math.sqrt(rank) if self.by_root else rank)


class Scales:
    """The scale of each layer of one file: what its key says, else the configuration, else 1."""

    def __init__(self, rules: Mapping[str, _Rule]) -> None:
        self._rules = rules  # by component, "" for all that have none

    @classmethod
    def of(cls, file: LoraFile, path: str) -> Scales:
        """Reads ``adapter_config.json`` beside ``path`` where the file is one of PEFT's. Raises InvalidLora."""
        try:
            return cls(_rules(_config(file, path)))
        except (ValueError, TypeError, AttributeError, re.error, OSError) as exc:
            raise InvalidLora(f"{path}: its LoRA configuration cannot be read: {exc}") from exc

    def of_layer(self, layer: str, factors: Factors) -> float:
        """alpha / rank, or alpha / sqrt(rank) for rank-stabilised LoRA."""
        if factors.alpha is not None:
            return factors.alpha / factors.rank
        name = layer.removeprefix(PEFT_PREFIX)
        for component, rule in self._rules.items():
            if component and name.startswith(f"{component}."):
                return rule.scale(name.removeprefix(f"{component}."), factors.rank)
        whole = self._rules.get("")
        return whole.scale(name, factors.rank) if whole is not None else 1.0


def _config(file: LoraFile, path: str) -> dict[str, Any]:
    """The one that is inside the file, or beside it. Beside a file that PEFT did not write it may be another's."""
    if METADATA_KEY in file.metadata:
        return dict(json.loads(file.metadata[METADATA_KEY]))
    beside = Path(path).with_name(CONFIG_NAME)
    peft = all(factors.peft for factors in file.layers.values())
    named = Path(path).name == "adapter_model.safetensors" or all(
        layer.startswith(PEFT_PREFIX) for layer in file.layers
    )
    return dict(json.loads(beside.read_text())) if peft and named and beside.is_file() else {}


def _rules(config: Mapping[str, Any]) -> dict[str, _Rule]:
    rules = {}
    for key, alpha in config.items():
        component, _, name = key.rpartition(".")
        if name == "lora_alpha":
            before = f"{component}." if component else ""
            patterns = {
                re.compile(p).pattern: float(a) for p, a in (config.get(f"{before}alpha_pattern") or {}).items()
            }
            rules[component] = _Rule(float(alpha), patterns, bool(config.get(f"{before}use_rslora")))
    return rules
