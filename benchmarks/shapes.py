"""The named shapes of the loss benchmarks: (rows, classes)."""

LOSS_SHAPES = {
    "128x10": (128, 10),  # an MLP on ten classes: all launch cost
    "128x100": (128, 100),
    "1024x1000": (1024, 1000),  # ImageNet
    "4096x1000": (4096, 1000),
    "512x32000": (512, 32000),  # a language model's vocabulary: out of every cache
    "1024x50257": (1024, 50257),
}

# (rows, width of the hidden states, classes)
LINEAR_SHAPES = {
    "2048x512x32000": (2048, 512, 32000),
}
