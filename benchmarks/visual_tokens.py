"""End-to-end time of answering with half of the visual tokens, against the full model and the arithmetic.

A model from configuration (a CLIP-shaped or patch encoder, a Llama-type trunk; random weights) answers one question:
encoder, projector, embedding, all denoising steps. The schedules are interleaved with the full model in one process;
printed are medians of paired ratios, the ratio that the multiply-adds alone would give (encoder included), and how much
of it is reached.

    python benchmarks/visual_tokens.py --visual 576 --answer 32 --steps 16
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from lossmith.sparsity import Denoised, PruneSchedule, denoise_generate, prefill_flops
from lossmith.sparsity.visual_tokens_cost import TransformerShape
from lossmith.tasks.multimodal import MultimodalDiffusionConfig, MultimodalDiffusionModel

SCHEDULES = (
    "random(step=input, keep=0.5)",
    "divprune(step=input, keep=0.5)",
    "one_nn(step=input, keep=0.5)",
    "fastv(step=0, layer=1, keep=0.5)",
    "answer_attention(step=0, keep=0.5)",
    "one_nn(progressive=[0.25, 0.5, 0.75])",
    "vtw(layer={middle}, every_step=True)",
    "answer_logits(step=0, keep=0.5)",
)


def build(arguments: argparse.Namespace) -> MultimodalDiffusionModel:
    torch.manual_seed(0)
    side = round(arguments.visual**0.5)
    if side * side != arguments.visual:
        raise SystemExit(f"--visual must be a square number, got {arguments.visual}")
    patch = 14 if arguments.encoder == "clip" else 4
    vision = {"model_type": "patches", "image_size": patch * side, "patch_size": patch, "hidden_size": 128}
    if arguments.encoder == "clip":
        vision |= {
            "model_type": "clip_vision_model", "num_hidden_layers": 4, "intermediate_size": 512,
            "num_attention_heads": 4,
        }  # fmt: skip
    text = {
        "model_type": "llama", "vocab_size": 1024, "hidden_size": arguments.width,
        "num_hidden_layers": arguments.layers, "intermediate_size": 3 * arguments.width,
        "num_attention_heads": arguments.width // 64, "max_position_embeddings": 4096,
    }  # fmt: skip
    return MultimodalDiffusionModel(MultimodalDiffusionConfig(vision, text, mask_token_id=3)).eval()


@torch.no_grad()
def answer(model: MultimodalDiffusionModel, arguments: argparse.Namespace, schedule: PruneSchedule | None) -> Denoised:
    size, batch = model.vision.size, arguments.batch
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(batch, 3, size, size, generator=generator)
    prompt = torch.randint(4, 1000, (batch, arguments.text), generator=generator)
    embeddings, visual, _ = model.embed_prompt({"pixel_values": pixels, "input_ids": prompt})
    return denoise_generate(
        model, embeddings, visual, answer_length=arguments.answer, steps=arguments.steps, prune=schedule, seed=0
    )


def encoder_flops(model: MultimodalDiffusionModel) -> float:
    """Multiply-adds of the encoder's layers and the projector; the patches' own layer is small."""
    tokens, width = model.vision.tokens, model.shape.width
    own = 0.0
    if not model.vision.own:
        config = model.configuration.vision
        shape = TransformerShape(config["num_hidden_layers"], config["hidden_size"], config["intermediate_size"])
        own = prefill_flops(shape, tokens + 1)
    return own + tokens * (model.vision.width * width + width * width)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--visual", type=int, default=576)
    parser.add_argument("--text", type=int, default=16)
    parser.add_argument("--answer", type=int, default=32)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--encoder", choices=["clip", "patches"], default="clip")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    model = build(arguments)
    texts = [text.format(middle=(arguments.layers - 1) // 2) for text in SCHEDULES]
    schedules: dict[str, PruneSchedule | None] = {"full": None, **{text: PruneSchedule.parse(text) for text in texts}}
    times: dict[str, list[float]] = {name: [] for name in schedules}
    flops: dict[str, float] = {}
    for number in range(arguments.repeats + 1):
        for name, schedule in schedules.items():
            started = time.perf_counter()
            found = answer(model, arguments, schedule)
            if number:
                times[name].append(time.perf_counter() - started)
            flops[name] = found.flops + encoder_flops(model)
    print(
        f"{torch.get_num_threads()} thread(s), torch {torch.__version__}; batch {arguments.batch}, {arguments.visual} "
        f"visual, {arguments.text} text, {arguments.answer} answer tokens in {arguments.steps} steps; width "
        f"{arguments.width}, {arguments.layers} layers, encoder {arguments.encoder}"
    )
    print(f"full model: {1e3 * statistics.median(times['full']):.0f} ms; ratios are medians of interleaved pairs")
    for name in texts:
        faster = statistics.median(a / b for a, b in zip(times["full"], times[name], strict=True))
        floor = flops["full"] / flops[name]
        print(f"  {name:40} {faster:5.2f}x faster, arithmetic {floor:5.2f}x, reached {faster / floor:4.0%}")


if __name__ == "__main__":
    main()
