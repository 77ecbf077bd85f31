"""Which tensor of a checkpoint's files each parameter of the model is.

Transformers renames tensors as it loads them, where a model's modules are called otherwise than when its checkpoints
were made, and cuts or joins some of them. The same rules are read here, without loading anything.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Source:
    """Where a parameter lies: a tensor's name, or one of its equal ``parts`` along the rows.

    ``parts`` is 0 where the tensor is changed in another way before it is the parameter, or a part of it.
    """

    tensor: str
    part: int = 0
    parts: int = 1


def parameter_sources(model: Any, tensors: Iterable[str]) -> dict[str, Source]:
    """Sources of a model's parameters by their names, by the rules with which ``from_pretrained`` finds them.

    Args:
        model: of transformers; without weights (on the meta device) will do.
        tensors: names in the files.

    >>> from transformers import ViTConfig, ViTModel
    >>> shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    >>> model = ViTModel(ViTConfig(image_size=8, patch_size=8, **shape))
    >>> name = "vit.encoder.layer.0.attention.attention.query.weight"
    >>> parameter_sources(model, [name]) == {"layers.0.attention.q_proj.weight": Source(name)}
    True
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import Chunk, WeightConverter, WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    prefix, parameters = model.base_model_prefix, model.state_dict()
    found: dict[str, Source] = {}
    for tensor in tensors:
        name, pattern = rename_source_key(tensor, renamings, converters, prefix, parameters)
        if name not in parameters and tensor in parameters:
            name, pattern = rename_source_key(tensor, [], [], prefix, parameters)
        if pattern is None:
            if name in parameters:
                found.setdefault(name, Source(tensor))
            continue
        rule = by_pattern[pattern]
        wanted = [name.replace(rule.target_patterns[0], target, 1) for target in rule.target_patterns]
        operations = rule.operations
        by_rows = (
            len(operations) == 1
            and isinstance(operations[0], Chunk)
            and operations[0].dim == 0
            and operations[0].num_shards_attribute is None
        )
        for number, target in enumerate(wanted):
            if target in parameters:
                found.setdefault(target, Source(tensor, number, len(wanted) if by_rows else 0))
    return found
