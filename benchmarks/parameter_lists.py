"""The shapes of the parameters of four models, in the order in which a model of PyTorch would have them."""

from __future__ import annotations

from collections.abc import Callable

Shape = tuple[int, ...]


def resnet50() -> list[Shape]:
    """ResNet-50 for ImageNet: He et al. 2016, with the stride in the 3x3 convolution, which changes no shape."""

    def convolution(outputs: int, inputs: int, size: int) -> list[Shape]:
        return [(outputs, inputs, size, size), (outputs,), (outputs,)]  # with its batch normalization

    shapes, inputs = convolution(64, 3, 7), 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += convolution(width, inputs, 1) + convolution(width, width, 3) + convolution(4 * width, width, 1)
            if block == 0:
                shapes += convolution(4 * width, inputs, 1)  # the shortcut
            inputs = 4 * width
    return [*shapes, (1000, inputs), (1000,)]


def vit_b_16(width: int = 768, layers: int = 12, patch: int = 16, image: int = 224) -> list[Shape]:
    """ViT-B/16 for ImageNet: Dosovitskiy et al. 2021."""
    embedding: list[Shape] = [
        (1, 1, width),
        (1, (image // patch) ** 2 + 1, width),
        (width, 3, patch, patch),
        (width,),
    ]
    return [*embedding, *_blocks(width, layers), (width,), (width,), (1000, width), (1000,)]


def gpt2_small(width: int = 768, layers: int = 12, vocabulary: int = 50257, context: int = 1024) -> list[Shape]:
    """GPT-2 with 124 million parameters, its output tied to its embedding: Radford et al. 2019."""
    return [(vocabulary, width), (context, width), *_blocks(width, layers), (width,), (width,)]


def llama_1b(
    width: int = 2048,
    layers: int = 16,
    vocabulary: int = 128256,
    heads: int = 32,
    kv_heads: int = 8,
    hidden: int = 8192,
) -> list[Shape]:
    """A language model of 1.2 billion parameters in the proportions of Llama 3.2 1B, output tied to the embedding."""
    kv = width // heads * kv_heads
    attention: list[Shape] = [(width, width), (kv, width), (kv, width), (width, width)]
    feed_forward: list[Shape] = [(hidden, width), (hidden, width), (width, hidden)]
    return [(vocabulary, width), *(attention + feed_forward + [(width,), (width,)]) * layers, (width,)]


def _blocks(width: int, layers: int) -> list[Shape]:
    """Transformer blocks with biases, query, key and value in one matrix and a fourfold feed-forward layer."""

    def linear(outputs: int, inputs: int) -> list[Shape]:
        return [(outputs, inputs), (outputs,)]

    norm: list[Shape] = [(width,), (width,)]
    attention = norm + linear(3 * width, width) + linear(width, width)
    return (attention + norm + linear(4 * width, width) + linear(width, 4 * width)) * layers


MODELS: dict[str, Callable[[], list[Shape]]] = {
    "resnet50": resnet50,
    "vit-b-16": vit_b_16,
    "gpt2-small": gpt2_small,
    "llama-1b": llama_1b,
}
