"""An installed wheel, alone: the native libraries load and give what their definitions give."""

import numpy as np
import torch

import sdfast
from sdfast import _native, hilbert
from sdfast.hilbert import secular

if not _native.CPU.loaded:
    raise SystemExit(f"the native CPU library is not loaded: {_native.CPU.reason}")
logits, labels = torch.randn(128, 10), torch.randint(0, 10, (128,))
gradients = []
for backend in ("cpu", "reference"):
    x = logits.clone().requires_grad_()
    sdfast.self_distillation_loss(x, labels, sdfast.AdaptiveAlpha(1.0), backend=backend).backward()
    gradients.append(x.grad)
torch.testing.assert_close(*gradients)
if secular.why_not_native():
    raise SystemExit(secular.why_not_native())
gram, y = np.diag(np.arange(1.0, 9)), np.arange(1.0, 9)
paths = [hilbert.self_distill(gram, y, relative_tolerance=0.1, backend=backend).c for backend in ("native", "array")]
np.testing.assert_allclose(*paths, rtol=1e-9)
print(f"sdfast {sdfast.__version__} from {sdfast.__path__[0]}: the wheel works")
