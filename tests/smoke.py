"""An installed wheel, alone: the native library loads and gives the gradient that the reference gives."""

import torch

import sdfast
from sdfast import _native

if not _native.CPU.loaded:
    raise SystemExit(f"the native CPU library is not loaded: {_native.CPU.reason}")
logits, labels = torch.randn(128, 10), torch.randint(0, 10, (128,))
gradients = []
for backend in ("cpu", "reference"):
    x = logits.clone().requires_grad_()
    sdfast.self_distillation_loss(x, labels, sdfast.AdaptiveAlpha(1.0), backend=backend).backward()
    gradients.append(x.grad)
torch.testing.assert_close(*gradients)
print(f"sdfast {sdfast.__version__} from {sdfast.__path__[0]}: the wheel works")
