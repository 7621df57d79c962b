"""The papers' networks: parameter counts of the literature, shapes, and what each is known by."""

import math

import pytest
import torch
from torch import nn

from sdfast.models import MODELS, CifarResNet, ShakeShake26, TwoLayerNet, WideResNet, make_model, mlp, register
from sdfast.models.shake_shake import shake


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def on_meta(build):
    with torch.device("meta"):
        return build()


# Millions as printed: He et al. 2016, Table 6; Zagoruyko & Komodakis 2016, Table 4; Gastaldi 2017, Table 1.
PRINTED = [
    (lambda: CifarResNet(20), 0.27, 2),
    (lambda: CifarResNet(32), 0.46, 2),
    (lambda: CifarResNet(44), 0.66, 2),
    (lambda: CifarResNet(56), 0.85, 2),
    (lambda: CifarResNet(110), 1.7, 1),
    (lambda: WideResNet(40, 1), 0.6, 1),
    (lambda: WideResNet(40, 2), 2.2, 1),
    (lambda: WideResNet(40, 4), 8.9, 1),
    (lambda: WideResNet(16, 8), 11.0, 1),
    (lambda: WideResNet(28, 10), 36.5, 1),
    (lambda: ShakeShake26(32), 2.9, 1),
    (lambda: ShakeShake26(96), 26.2, 1),
]


@pytest.mark.parametrize(("build", "millions", "digits"), PRINTED)
def test_parameters_are_those_the_papers_print(build, millions, digits):
    assert round(count(on_meta(build)) / 1e6, digits) == millions


def test_parameters_to_the_last():
    """Counted by hand, layer by layer: convolutions without bias, two numbers a BatchNorm channel."""

    def resnet(depth):
        blocks = (depth - 2) // 6
        convolutions = 9 * (16 * (3 + 2 * blocks * 16) + 32 * (16 + (2 * blocks - 1) * 32))
        convolutions += 9 * 64 * (32 + (2 * blocks - 1) * 64)
        norms = 2 * (16 + 2 * blocks * (16 + 32 + 64))
        return convolutions + norms + 65 * 10

    for depth in (20, 32, 56, 110):
        assert count(on_meta(lambda depth=depth: CifarResNet(depth))) == resnet(depth)
    assert count(on_meta(lambda: make_model("vgg16_bn", (3, 32, 32), 10))) == 14_728_266
    # Dong et al., Table 2, with the 100 outputs that CIFAR-100 wants.
    convolutions = 27 * 32 + 32 + 9 * 32 * 64 + 64 + 9 * 64 * 128 + 128
    norms = 2 * (32 + 64 + 128 + 512)
    student = on_meta(lambda: make_model("small_cnn", (3, 32, 32), 100))
    assert count(student) == convolutions + norms + (128 * 16 + 1) * 512 + 513 * 100
    assert count(make_model("mlp", (64,), 10)) == 65 * 256 + 257 * 256 + 257 * 10


PICTURES = {"mlp": (1, 28, 28), "small_cnn": (1, 8, 8)}


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"two_layer"}))
def test_every_network_maps_pictures_to_logits(name):
    shape = PICTURES.get(name, (3, 32, 32))
    model = on_meta(lambda: make_model(name, shape, 7)).eval()
    assert model(torch.empty(2, *shape, device="meta")).shape == (2, 7)


@pytest.mark.parametrize("name", ["small_cnn", "resnet20", "wide_resnet28_1", "shake_shake26_32", "vgg16_bn", "mlp"])
def test_every_family_learns(name):
    """Each weight gets a gradient, and one step down it lowers the loss of that batch."""
    torch.manual_seed(0)
    model = make_model(name, (1, 32, 32), 3)
    inputs, labels = torch.randn(6, 1, 32, 32), torch.tensor([0, 1, 2, 0, 1, 2])

    def loss():
        torch.manual_seed(1)  # the same draws of shake-shake
        return nn.functional.cross_entropy(model(inputs), labels)

    before = loss()
    before.backward()
    assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for p in model.parameters() if p.dim() > 1)
    with torch.no_grad():
        length = math.sqrt(sum(float((p.grad**2).sum()) for p in model.parameters()))
        for p in model.parameters():
            p -= 1e-3 / length * p.grad
        assert float(loss()) < float(before)


def test_a_shortcut_without_weights_is_the_identity():
    """ResNet's blocks with all weights zero pass their input on, the new channels zero around it."""
    block = CifarResNet(20).blocks[3].eval()  # 16 channels to 32
    for parameter in block.parameters():
        nn.init.zeros_(parameter)
    x = torch.rand(2, 16, 8, 8)
    out = block(x)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any()
    assert not out[:, 24:].any()


def test_shake_mixes_one_way_and_returns_another():
    torch.manual_seed(0)
    first, second = torch.randn(5, 2, 3, 3, requires_grad=True), torch.randn(5, 2, 3, 3, requires_grad=True)
    out = shake(first, second)
    weight = ((out - second) / (first - second)).detach().flatten(1)
    assert torch.allclose(weight, weight[:, :1].expand_as(weight), atol=1e-4)  # one for each picture
    out.sum().backward()
    assert torch.allclose(first.grad + second.grad, torch.ones_like(first))
    back = first.grad.flatten(1)
    assert torch.allclose(back, back[:, :1].expand_as(back))
    assert bool(((weight[:, 0] >= 0) & (weight[:, 0] <= 1) & (back[:, 0] >= 0) & (back[:, 0] <= 1)).all())
    assert float((weight[:, 0] - back[:, 0]).abs().min()) > 1e-4
    assert len(set(weight[:, 0].tolist())) == 5


def test_shake_shake_is_fixed_in_evaluation():
    model = ShakeShake26(4).eval()
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(model(x), model(x))
    assert not torch.equal(model.train()(x), model(x))


def test_the_network_of_theorem_1():
    """Fixed outputs ±1/√k, half of each; the symmetric start is zero everywhere; its kernel is the paper's."""
    model = TwoLayerNet(6, 40, symmetric=True).double()
    x = torch.nn.functional.normalize(torch.randn(5, 6, dtype=torch.float64), dim=1)
    assert float(model(x).detach().abs().max()) < 1e-15
    assert [name for name, _ in model.named_parameters()] == ["weight"]
    assert model.output.abs().unique().numel() == 1
    assert float(model.output.sum()) == pytest.approx(0, abs=1e-12)
    model = TwoLayerNet(6, 40).double()
    with torch.no_grad():
        wanted = torch.erf(x @ model.weight.T) @ model.output
    assert torch.allclose(model(x).detach()[:, 0], wanted)
    rows = [torch.autograd.grad(value, model.weight, retain_graph=True)[0].flatten() for value in model(x)[:, 0]]
    jacobian = torch.stack(rows)
    slope = 2 / math.sqrt(math.pi) * torch.exp(-((x @ model.weight.T) ** 2))
    kernel = ((slope * model.output**2) @ slope.T) * (x @ x.T)  # eq. of the paper, its ⊙ lost in print
    assert torch.allclose(jacobian @ jacobian.T, kernel.detach())


def test_a_model_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "my_networks.py").write_text(
        "from torch import nn\n"
        "def plain(num_classes): return nn.Linear(4, num_classes)\n"
        "def shaped(input_shape, num_classes): return nn.Linear(input_shape[0], num_classes)\n"
        "def keywords(**options): return nn.Linear(4, options['num_classes'])\n"
        "def fixed(): return nn.Linear(4, 2)\n"
        "def nothing(): return 5\n"
    )
    monkeypatch.chdir(tmp_path)
    for name in ("plain", "shaped", "keywords"):
        assert make_model(f"my_networks:{name}", (4,), 3).weight.shape == (3, 4)
    assert make_model("my_networks:fixed", (4,), 3).weight.shape == (2, 4)
    with pytest.raises(ValueError, match=r"my_networks:nothing returned int, wanted a torch\.nn\.Module"):
        make_model("my_networks:nothing", (4,), 3)
    with pytest.raises(ValueError, match="module my_networks has no function 'absent'"):
        make_model("my_networks:absent", (4,), 3)
    with pytest.raises(ValueError, match="No module named 'nowhere_to_be_found'"):
        make_model("nowhere_to_be_found:net", (4,), 3)


def test_a_registered_model_is_found(monkeypatch):
    monkeypatch.setattr("sdfast.models.registry.MODELS", dict(MODELS))

    @register("linear")
    def build(input_shape, num_classes):
        return nn.Linear(*input_shape, num_classes)

    assert make_model("linear", (4,), 3).weight.shape == (3, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_model("resnet21", (3, 32, 32), 10), "model: got 'resnet21', wanted module:function or one of"),
        (lambda: make_model("resnet20", (64,), 10), "resnet20 got inputs (64,), wanted (channels, height, width)"),
        (lambda: make_model("vgg16_bn", (1, 28, 28), 10), "wanted (channels, height, width) with sides of at least 32"),
        (lambda: make_model("two_layer", (4,), 10), "two_layer has one output for rows, not 10"),
        (lambda: CifarResNet(21), "depth: got 21, wanted 6n + 2"),
        (lambda: WideResNet(27, 1), "depth: got 27, wanted 6n + 4"),
        (lambda: WideResNet(28, 0), "width: got 0"),
        (lambda: ShakeShake26(0), "width: got 0"),
        (lambda: TwoLayerNet(3, 5), "width: got 5, wanted an even number"),
        (lambda: mlp((3,)), "widths: got [3]"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        call()
    assert message in str(caught.value)
