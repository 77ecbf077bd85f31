"""A multimodal language model that unmasks its answers: vision encoder, projector, bidirectional Llama-type trunk."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lossmith.errors import InputError
from lossmith.files import read_json, replacing, write_json
from lossmith.sparsity.visual_tokens_cost import TransformerShape
from lossmith.sparsity.visual_tokens_denoiser import AfterAttention
from lossmith.sparsity.visual_tokens_schedule import PruneSchedule
from lossmith.tasks.multimodal.vision import VisionEncoder

_TYPE = "lossmith-multimodal-diffusion"
_PARTS = ("embed_tokens", "layers", "norm", "rotary_emb")
_LAYER_PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")


@dataclass(frozen=True, slots=True)
class MultimodalDiffusionConfig:
    """Shape of a :class:`MultimodalDiffusionModel`.

    Attributes:
        vision: see :class:`VisionEncoder`.
        text: configuration of a Llama-type model of transformers (Llama, Qwen2, Qwen3, Mistral ...) as a dictionary
            with ``model_type``.
        mask_token_id: of the token that stands for "not written yet".
        shifted: each token is predicted from the place before it, as autoregressive models do (and Dream, which was
            adapted from one); ``False``: from its own place (LLaDA).
        image_mean, image_std: of the pixels.
        visual_pruning: how answers are written by default; see :func:`lossmith.sparsity.prune_visual_tokens`.
    """

    vision: Mapping[str, Any]
    text: Mapping[str, Any]
    mask_token_id: int
    shifted: bool = False
    image_mean: tuple[float, ...] = (0.5,)
    image_std: tuple[float, ...] = (0.5,)
    visual_pruning: Mapping[str, Any] | None = field(default=None)


class MultimodalDiffusionModel(nn.Module):
    """Image and prompt in, answer out, by unmasking.

    The sequence is ``image, prompt, answer``; all tokens see each other. It is a
    :class:`lossmith.sparsity.Denoiser`, so that :func:`lossmith.sparsity.denoise_generate` writes its answers and drops
    visual tokens between its steps and inside its layers.

    Args:
        config: the shape; weights are random (torch's global generator) unless parts are given.
        vision: a vision encoder with weights.
        trunk: a Llama-type ``AutoModel`` with weights.
        lm_head: output layer with weights.

    Raises:
        InputError: a configuration that is none, or a trunk that is not of Llama's type.
    """

    trunk: Any

    def __init__(
        self,
        config: MultimodalDiffusionConfig,
        *,
        vision: nn.Module | None = None,
        trunk: nn.Module | None = None,
        lm_head: nn.Linear | None = None,
    ):
        super().__init__()
        self.vision = VisionEncoder(config.vision, vision, mean=config.image_mean, std=config.image_std)
        body: Any = trunk if trunk is not None else _build_trunk(config.text)
        _check_trunk(body)
        body.config._attn_implementation = "sdpa"
        text = body.config
        self.trunk = body
        width = int(text.hidden_size)
        self.projector = nn.Sequential(nn.Linear(self.vision.width, width), nn.GELU(), nn.Linear(width, width))
        tied = bool(getattr(text, "tie_word_embeddings", False))
        if lm_head is None:
            lm_head = nn.Linear(width, text.vocab_size, bias=False)
            nn.init.normal_(lm_head.weight, std=getattr(text, "initializer_range", 0.02))
        self.lm_head = lm_head
        if tied:
            self.lm_head.weight = body.embed_tokens.weight
        self.tied = tied
        if not 0 <= config.mask_token_id < text.vocab_size:
            raise InputError(f"mask_token_id {config.mask_token_id} is none of the {text.vocab_size} tokens")
        self.configuration = dataclasses.replace(config, vision=dict(config.vision), text=text.to_dict())
        gated = hasattr(body.layers[0].mlp, "gate_proj")
        self.shape = TransformerShape(len(body.layers), width, int(text.intermediate_size), 3 if gated else 2)

    @property
    def mask_token_id(self) -> int:
        """Token that stands for what is not written yet."""
        return self.configuration.mask_token_id

    @property
    def shifted(self) -> bool:
        """Whether each token is predicted from the place before it."""
        return self.configuration.shifted

    @property
    def visual_pruning(self) -> PruneSchedule | None:
        """How answers are written by default."""
        return PruneSchedule.parse(self.configuration.visual_pruning)

    @visual_pruning.setter
    def visual_pruning(self, schedule: PruneSchedule | None) -> None:
        options = schedule.to_dict() if schedule is not None else None
        self.configuration = dataclasses.replace(self.configuration, visual_pruning=options)

    # ---- forward ----------------------------------------------------------------------------------------------------

    def embed(self, ids: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length width"]:
        """Embeddings of tokens."""
        return self.trunk.embed_tokens(ids)

    def embed_images(self, pixels: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch visual width"]:
        """Visual tokens: the encoder's features through the projector."""
        return self.projector(self.vision(pixels))

    def embed_prompt(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, slice, Tensor | None]:
        """Image and prompt as one sequence, where the image is, and which tokens are real."""
        images = self.embed_images(batch["pixel_values"])
        words = self.embed(batch["input_ids"])
        real = batch.get("attention_mask")
        if real is not None:
            real = torch.cat([torch.ones_like(images[..., 0], dtype=torch.bool), real.bool()], dim=1)
        return torch.cat([images.to(words.dtype), words], dim=1), slice(0, images.shape[1]), real

    def denoise(
        self,
        embeddings: Float[Tensor, "batch tokens width"],
        positions: Int[Tensor, "batch tokens"],
        real: Bool[Tensor, "batch tokens"] | None,
        answer_length: int,
        after_attention: AfterAttention | None = None,
        *,
        causal: bool = False,
    ) -> tuple[Float[Tensor, "batch left width"], Float[Tensor, "batch answer classes"]]:
        """See :class:`lossmith.sparsity.Denoiser`; ``causal``: each token sees those before it only."""
        hidden = self._hidden(embeddings, positions, real, after_attention, causal)
        return hidden, self.lm_head(self._answers(hidden, answer_length))

    def answer_hidden(
        self, batch: Mapping[str, Tensor], answer_ids: Int[Tensor, "batch length"], *, causal: bool = False
    ) -> Float[Tensor, "batch length width"]:
        """What enters the output layer at each token of the answer.

        Args:
            batch: ``pixel_values``, ``input_ids`` of the prompts, filled up on the left where ``attention_mask`` is 0,
                and, where answers are filled up on the right, ``labels`` that are -100 there.
            answer_ids: the answers, with masks.
            causal: each token sees those before it only.
        """
        prompt, _, real = self.embed_prompt(batch)
        embeddings = torch.cat([prompt, self.embed(answer_ids)], dim=1)
        written = batch["labels"] != -100 if "labels" in batch else torch.ones_like(answer_ids, dtype=torch.bool)
        if real is None:
            real = torch.ones_like(prompt[..., 0], dtype=torch.bool)
        real = torch.cat([real, written], dim=1)
        positions = (real.long().cumsum(1) - 1).clamp_min(0)
        hidden = self._hidden(embeddings, positions, None if real.all() else real, None, causal)
        return self._answers(hidden, answer_ids.shape[1])

    def _hidden(
        self,
        hidden: Tensor,
        positions: Tensor,
        real: Tensor | None,
        after_attention: AfterAttention | None,
        causal: bool,
    ) -> Tensor:
        rotary = self.trunk.rotary_emb(hidden, position_ids=positions)
        for number, layer in enumerate(self.trunk.layers):
            mask = _mask(real, hidden.shape[1] if causal else None, hidden.device)
            entering = layer.input_layernorm(hidden)
            mixed, _ = layer.self_attn(
                hidden_states=entering, position_embeddings=rotary, attention_mask=mask, is_causal=False
            )
            hidden = hidden + mixed
            if after_attention is not None:
                index = after_attention(number, hidden, _LogitsOf(layer.self_attn, entering, rotary, mask))
                if index is not None:
                    hidden = hidden.gather(1, index.unsqueeze(-1).expand(-1, -1, hidden.shape[2]))
                    positions = positions.gather(1, index)
                    real = None if real is None else real.gather(1, index)
                    rotary = self.trunk.rotary_emb(hidden, position_ids=positions)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        result: Tensor = self.trunk.norm(hidden)
        return result

    def _answers(self, hidden: Tensor, length: int) -> Tensor:
        return hidden[:, -length - 1 : -1] if self.shifted else hidden[:, -length:]

    # ---- files ------------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """``config.json`` and ``model.safetensors``."""
        from safetensors.torch import save_file

        folder = Path(folder)
        state = {name: value.contiguous() for name, value in self.state_dict().items()}
        if self.tied:
            state.pop("lm_head.weight")
        with replacing(folder / "model.safetensors") as temporary:
            save_file(state, temporary)
        write_json(folder / "config.json", {"model_type": _TYPE, **dataclasses.asdict(self.configuration)})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> MultimodalDiffusionModel:
        """A saved model, in evaluation mode.

        Raises:
            InputError: a folder that holds none, or whose weights do not fit its configuration.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(folder)
        if not (folder / "config.json").is_file() or not (folder / "model.safetensors").is_file():
            raise InputError(f"{folder} holds no multimodal model (config.json and model.safetensors)")
        try:
            values = read_json(folder / "config.json")
        except ValueError:
            raise InputError(f"{folder}/config.json is not JSON") from None
        if not isinstance(values, dict) or values.pop("model_type", None) != _TYPE:
            raise InputError(f"{folder} holds another kind of model, not one written by lossmith.tasks.multimodal")
        values["image_mean"], values["image_std"] = tuple(values["image_mean"]), tuple(values["image_std"])
        model = cls(MultimodalDiffusionConfig(**values))
        try:
            state = load_file(folder / "model.safetensors")
            if model.tied:
                state["lm_head.weight"] = state["trunk.embed_tokens.weight"]
            model.load_state_dict(state)
        except (SafetensorError, RuntimeError, KeyError) as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise InputError(f"{folder}/model.safetensors does not fit its config.json: {reason}") from None
        return model.to(state["projector.0.weight"].dtype).eval()


class _LogitsOf:
    """Attention logits of one layer, computed when they are asked for: fused attention does not give them."""

    def __init__(self, attention: Any, entering: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None):
        self.attention, self.entering, self.rotary, self.mask = attention, entering, rotary, mask

    def __call__(self, queries: slice | None = None) -> Tensor:
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

        own, cos, sin = self.attention, *self.rotary
        shape = (*self.entering.shape[:-1], -1, own.head_dim)
        q, k = own.q_proj(self.entering).view(shape), own.k_proj(self.entering).view(shape)
        if hasattr(own, "q_norm"):
            q, k = own.q_norm(q), own.k_norm(k)
        q, k = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        chosen = slice(None) if queries is None else queries
        k = repeat_kv(k, own.num_key_value_groups)
        logits: Tensor = (q[:, :, chosen] @ k.transpose(2, 3)) * own.scaling
        return logits if self.mask is None else logits.masked_fill(~self.mask, -torch.inf)


def _mask(real: Tensor | None, causal: int | None, device: torch.device) -> Tensor | None:
    """Which keys each query sees, broadcast over heads; ``None``: all."""
    mask = None if real is None else real[:, None, None, :]
    if causal is not None:
        past = torch.ones(causal, causal, dtype=torch.bool, device=device).tril()
        mask = past[None, None] if mask is None else past[None, None] & mask
        # What is only filled sees itself: a row without keys would be NaN.
        mask = mask | torch.eye(causal, dtype=torch.bool, device=device)
    return mask


def _build_trunk(config: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModel

    if "model_type" not in config:
        raise InputError(f"a text configuration needs 'model_type', got {sorted(config)[:12]}")
    options = {k: v for k, v in config.items() if k != "model_type"}
    try:
        return AutoModel.from_config(AutoConfig.for_model(config["model_type"], **options))
    except ValueError as error:
        raise InputError(f"text configuration: {str(error).splitlines()[0][:200]}") from None


def _check_trunk(trunk: Any) -> None:
    missing = [name for name in _PARTS if not hasattr(trunk, name)]
    layers = getattr(trunk, "layers", [])
    if not missing and len(layers):
        first = layers[0]
        missing = [name for name in _LAYER_PARTS if not hasattr(first, name)]
        missing += [name for name in ("q_proj", "k_proj", "v_proj") if not hasattr(first.self_attn, name)]
        # Gemma's layers have norms in other places.
        missing += ["two norms only"] if hasattr(first, "pre_feedforward_layernorm") else []
    if missing or not len(layers):
        raise InputError(
            f"the trunk must be a Llama-type model (Llama, Qwen2, Qwen3, Mistral ...); {type(trunk).__name__} lacks "
            f"{', '.join(missing) or 'layers'}"
        )
