"""Whole networks of the Gram benchmark, and what a user would write in torch to get their Gram matrix."""

import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

import sdfast
from benchmarks.shapes import sized
from sdfast.models.cifar_resnet import CifarResNet


class Block(nn.Module):
    """Attention and an MLP, each behind a layer norm, of plain operations that every peer can take."""

    def __init__(self, width, heads, causal):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        n, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT / (d // self.heads) ** 0.5
        if self.causal:
            scores = scores + torch.full((t, t), -torch.inf, device=x.device).triu(1)
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, t, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Of tokens (n, T), the last of which is read out; or of pictures, in patches, whose mean is."""

    def __init__(self, width, heads, depth, length, vocabulary=None):
        super().__init__()
        self.pictures = vocabulary is None
        self.entry = nn.Conv2d(3, width, 4, 4) if self.pictures else nn.Embedding(vocabulary, width)
        self.place = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads, not self.pictures) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary or 10)

    def forward(self, x):
        x = self.entry(x).flatten(2).mT if self.pictures else self.entry(x)
        x = x + self.place(torch.arange(x.shape[1], device=x.device).expand(len(x), -1))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x.mean(1) if self.pictures else x[:, -1]))


def nngeometry_gram(model, x):
    """As nngeometry has it, of the sum of the outputs."""
    from nngeometry.gram import GramMatrix

    loader = DataLoader(TensorDataset(x.clone()), batch_size=len(x))
    return GramMatrix(model, loader, function=lambda inputs: model(inputs).sum(1)).data.view(len(x), len(x))


def resnet(n):
    """ResNet-20 on pictures of 32 x 32."""
    return CifarResNet(20).eval(), torch.randn(n, 3, 32, 32)


# group -> the model and n samples
NETWORKS = {
    "ResNet-20 n=128": lambda: resnet(128),
    "GPT block T=64 n=64": lambda: (Transformer(256, 4, 1, 64, 1000), torch.randint(0, 1000, (64, 64))),
    "MLP 784-2048-2048-10 n=1000": lambda: (sdfast.models.mlp((784, 2048, 2048, 10)), torch.randn(1000, 784)),
    "ViT-tiny n=128": lambda: (Transformer(192, 3, 12, 64), torch.randn(128, 3, 32, 32)),
    "ResNet-20 n=1000": lambda: resnet(1000),
}


def trained_a_little(name, n):
    """``resnet8``, ``resnet56`` or ``mlp`` in evaluation mode, whose batch norms have seen something, and n samples."""
    if name == "mlp":
        width = sized(2048)[0]
        model, x = sdfast.models.mlp((784, width, width, 10)), torch.randn(n, 784)
    else:
        model, x = CifarResNet(int(name.removeprefix("resnet"))), torch.randn(n, 3, 32, 32)
    model(x[:64])
    return model.eval(), x


def floor_flops(model, x):
    """A forward and backward pass of every sample, as torch counts them, and n² p for the triangle."""
    some = x[: min(len(x), 32)]
    with FlopCounterMode(display=False) as counter:
        model(some).sum().backward()
    model.zero_grad()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return counter.get_total_flops() * len(x) // len(some) + len(x) ** 2 * parameters


def _rows(model, x, chunk):
    """Gradients per sample by torch.func, of each parameter (n, numel)."""
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    constants = dict(model.named_buffers())

    def scalar(values, sample):
        return functional_call(model, (values, constants), (sample[None],)).sum()

    gradients = vmap(grad(scalar), (None, 0), chunk_size=chunk)(parameters, x)
    return [rows.flatten(1) for rows in gradients.values()]


def contraction(model, x, chunk, held=2**32):
    """torch.func: all gradients, layer by layer multiplied; of more than 4 GiB a pair of blocks at a time."""
    numbers = sum(parameter.numel() for parameter in model.parameters())
    block = min(len(x), max(1, held // (4 * numbers)))
    h = x.new_zeros(len(x), len(x), dtype=torch.float32)
    for top in range(0, len(x), block):
        rows = _rows(model, x[top : top + block], chunk)
        for left in range(0, top + 1, block):
            other = rows if left == top else _rows(model, x[left : left + block], chunk)
            tile = sum(one @ two.T for one, two in zip(rows, other, strict=True))
            h[top : top + block, left : left + block] = tile
            h[left : left + block, top : top + block] = tile.T
    return h


def products(model, x, columns):
    """NTK-vector products: Jᵀ e_j by a vjp, J of it by a jvp, for some columns j of H."""
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    constants = dict(model.named_buffers())

    def outputs(values):
        return functional_call(model, (values, constants), (x,)).sum(1)

    pull = vjp(outputs, parameters)[1]
    unit = torch.eye(len(x))[:columns]
    return torch.stack([jvp(outputs, (parameters,), (pull(row)[0],))[1] for row in unit], 1)


class Hooks:
    """Module hooks: the input and the output's gradient of each layer make its gradients per sample."""

    def __init__(self, model):
        self.model, self.inputs, self.rows = model, {}, {}
        for module in model.modules():
            if list(module.parameters(recurse=False)):
                module.register_forward_hook(self._forward)

    def _forward(self, module, arguments, output):
        source = arguments[0].detach()
        output.register_hook(lambda gradient: self.rows.update({module: _layer_rows(module, source, gradient)}))

    def gram(self, x, batch=32):
        """H of all samples."""
        parts = []
        for few in x.split(batch):
            self.rows.clear()
            torch.autograd.grad(self.model(few).sum(), list(self.model.parameters()))
            parts.append([rows for layer in self.model.modules() if layer in self.rows for rows in self.rows[layer]])
        return sum(rows @ rows.T for rows in map(torch.cat, zip(*parts, strict=True)))


def _layer_rows(module, x, gradient):
    if isinstance(module, nn.Conv2d):
        columns = F.unfold(x, module.kernel_size, padding=module.padding, stride=module.stride)
        rows = [torch.bmm(gradient.flatten(2), columns.mT).flatten(1)]
        return rows if module.bias is None else [*rows, gradient.sum((2, 3))]
    if isinstance(module, nn.BatchNorm2d):
        normalized = F.batch_norm(x, module.running_mean, module.running_var, eps=module.eps)
        return [(normalized * gradient).sum((2, 3)), gradient.sum((2, 3))]
    if isinstance(module, nn.LayerNorm):
        normalized = F.layer_norm(x, module.normalized_shape, eps=module.eps)
        return [part.flatten(1, -2).sum(1) if part.dim() > 2 else part for part in (normalized * gradient, gradient)]
    if isinstance(module, nn.Embedding):
        table = gradient.new_zeros(len(x) * module.num_embeddings, gradient.shape[-1])
        places = x + torch.arange(len(x), device=x.device)[:, None] * module.num_embeddings
        return [table.index_add_(0, places.flatten(), gradient.flatten(0, 1)).view(len(x), -1)]
    x, gradient = (part.flatten(1, -2) if part.dim() > 2 else part[:, None] for part in (x, gradient))
    return [torch.bmm(gradient.mT, x).flatten(1), gradient.sum(1)]


def plain_pass(model, x, batch):
    """One eager forward and backward over all samples."""
    for few in x.split(batch):
        torch.autograd.grad(model(few).sum(), list(model.parameters()))


def multiply(flops, side=1024):
    """So many FLOPs by torch's GEMM."""
    whole, rest = divmod(round(flops), 2 * side**3)
    left, right, out = torch.ones(side, side), torch.ones(side, side), torch.empty(side, side)
    for _ in range(whole):
        torch.mm(left, right, out=out)
    if columns := rest // (2 * side**2):
        torch.mm(left, right[:, :columns])


def fastest_of(choices, step):
    """The choice with which a step takes least, each tried twice."""

    def seconds(choice):
        took = []
        for _ in range(2):
            start = time.perf_counter()
            step(choice)
            took.append(time.perf_counter() - start)
        return min(took)

    return min(choices, key=seconds)
