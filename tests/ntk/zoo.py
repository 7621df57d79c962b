"""Small networks of every kind, in float64. ZOO: name -> (network, input) makers; each call draws fresh numbers."""

import torch
from torch import nn
from torch.nn import functional as F


class ResNet(nn.Module):
    def __init__(self, zero_gamma=True, width=4, groups=1):
        super().__init__()
        self.stem = nn.Conv2d(2, width, 3, padding=1, bias=False)
        self.norm0 = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, groups=groups, bias=False)
        self.norm1 = nn.BatchNorm2d(2 * width)
        self.conv2 = nn.Conv2d(2 * width, 2 * width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(2 * width)
        self.shortcut = nn.Conv2d(width, 2 * width, 1, stride=2, bias=False)
        self.head = nn.Linear(2 * width, 3)
        for norm in (self.norm0, self.norm1, self.norm2):
            nn.init.normal_(norm.running_mean, 0, 0.1)
            nn.init.uniform_(norm.running_var, 0.5, 2)
        if zero_gamma:
            nn.init.zeros_(self.norm2.weight)

    def forward(self, x):
        x = F.relu_(self.norm0(self.stem(x)))
        branch = self.norm2(self.conv2(F.relu_(self.norm1(self.conv1(x)))))
        branch += self.shortcut(x)
        return self.head(F.relu_(branch).mean((2, 3)))


class Attention(nn.Module):
    """A block with its own qkv projection and `scaled_dot_product_attention`."""

    def __init__(self, width=6, heads=2, causal=False):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x):
        n, t, d = x.shape
        q, k, v = self.qkv(self.norm(x)).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, t, d))
        return x + self.mlp(x)


class ViT(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.patch = nn.Conv2d(1, width, 2, 2)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.place = nn.Parameter(torch.randn(1, 5, width))
        self.block = Attention(width)
        self.head = nn.Linear(width, 2)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.place
        return self.head(self.block(x)[:, 0])


class GPT(nn.Module):
    """Embedding and head share one weight."""

    def __init__(self, vocabulary=7, width=6, length=5):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.place = nn.Embedding(length, width)
        self.block = Attention(width, causal=True)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens) + self.place(torch.arange(tokens.shape[1]))
        return self.head(self.block(x)[:, -1])


class Recurrent(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.core = kind(3, 4, **options)
        self.head = nn.Linear(8 if options.get("bidirectional") else 4, 2)
        self.first = options.get("batch_first", False)

    def forward(self, x):
        out, _ = self.core(x if self.first else x.transpose(0, 1))
        return self.head(out.mean(1 if self.first else 0))


class MultiHead(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.need_weights = options.pop("need_weights", False)
        self.core = nn.MultiheadAttention(4, 2, **options)
        self.head = nn.Linear(4, 2)
        self.first = options.get("batch_first", False)
        self.kdim, self.vdim = self.core.kdim, self.core.vdim

    def forward(self, x):
        x = x if self.first else x.transpose(0, 1)
        out, weights = self.core(x, x[..., : self.kdim], x[..., : self.vdim], need_weights=self.need_weights)
        out = out.mean(1 if self.first else 0)
        return self.head(out if weights is None else out + weights.mean((1, 2))[:, None])


class Pooled(nn.Module):
    """A layer on its own, its output pooled by fixed random weights to two numbers."""

    def __init__(self, layer, features=2):
        super().__init__()
        self.layer = layer
        self.features = features
        self.register_buffer("mixture", None)

    def forward(self, x):
        out = self.layer(x).flatten(1)
        if self.mixture is None or len(self.mixture) != out.shape[1]:
            generator = torch.Generator().manual_seed(1)
            self.mixture = torch.randn(out.shape[1], self.features, generator=generator, dtype=out.dtype)
        return torch.tanh(out) @ self.mixture


class WideResNetBlock(nn.Module):
    """Pre-activation."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 3, 3, padding=1)
        self.norm1, self.norm2 = nn.BatchNorm2d(3), nn.BatchNorm2d(6)
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.shortcut = nn.Conv2d(3, 6, 1)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        x = self.stem(x)
        y = F.relu(self.norm1(x))
        y = self.conv2(F.relu(self.norm2(self.conv1(y)))) + self.shortcut(x)
        return self.head(y.mean((2, 3)))


def mlp():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def vgg():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(inplace=True),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 6), nn.ReLU(inplace=True), nn.Linear(6, 3),
    )  # fmt: skip


def depthwise():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU6(), nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False),
        nn.BatchNorm2d(4), nn.ReLU6(inplace=True), nn.Conv2d(4, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(6, 2),
    )  # fmt: skip


def images(n, channels=2, size=4):
    return torch.randn(n, channels, size, size)


def sequences(n, length=5, width=3):
    return torch.randn(n, length, width)


def tokens(n, vocabulary=7, length=5):
    return torch.randint(0, vocabulary, (n, length))


# name -> (network, input of n samples, rules that must serve it: a fallback would hide a rule that is never used)
ZOO = {
    "mlp": (mlp, lambda n: torch.randn(n, 4), {"linear"}),
    "resnet": (lambda: ResNet().eval(), images, {"convolution 2d", "batch norm", "linear"}),
    "resnet, grouped": (lambda: ResNet(False, groups=2).eval(), images, {"convolution 2d", "batch norm", "linear"}),
    "wide resnet": (lambda: WideResNetBlock().eval(), images, {"convolution 2d", "batch norm", "linear"}),
    "vgg": (vgg, images, {"convolution 2d", "linear"}),
    "depthwise-separable": (lambda: depthwise().eval(), images, {"convolution 2d", "batch norm", "linear"}),
    "vit": (ViT, lambda n: images(n, 1), {"convolution 2d", "linear", "layer norm", "vmap of the operation"}),
    "gpt, tied": (GPT, tokens, {"embedding", "linear", "layer norm", "vmap of the operation"}),
    "lstm": (
        lambda: Recurrent(nn.LSTM, batch_first=True, num_layers=2, bidirectional=True),
        sequences,
        {"vmap of the operation", "linear"},
    ),
    "gru, sequence first": (
        lambda: Recurrent(nn.GRU),
        sequences,
        {"vmap of the operation", "linear"},
    ),
    "rnn": (
        lambda: Recurrent(nn.RNN, batch_first=True),
        sequences,
        {"vmap of the operation", "linear"},
    ),
    "transformer layer": (
        lambda: Pooled(nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)),
        lambda n: sequences(n, width=4),
        {"linear", "layer norm"},
    ),
    "transformer layer, eval, sequence first": (
        lambda: Pooled(SequenceFirst(nn.TransformerEncoderLayer(4, 2, 6))).eval(),
        lambda n: sequences(n, width=4),
        {"linear", "layer norm"},
    ),
}


class SequenceFirst(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.transpose(0, 1)).transpose(0, 1)
