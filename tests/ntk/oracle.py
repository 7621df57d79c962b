"""Plain definitions to compare with: the Jacobian by autograd alone, and every form of the Gram matrix from it."""

import torch


def jacobian(model, x, params=None, call=None):
    """(n, C, p) by one plain `autograd.grad` for each output of each sample."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad and (params is None or name in params)}
    tensors = list(named.values())
    if call is not None:
        out = call(model, x)
    elif isinstance(x, dict):
        out = model(**x)
    else:
        out = model(*x) if isinstance(x, tuple) else model(x)
    out = out.reshape(len(out), -1)
    rows = []
    for i in range(out.shape[0]):
        for c in range(out.shape[1]):
            gradients = torch.autograd.grad(out[i, c], tensors, retain_graph=True, allow_unused=True)
            rows.append(torch.cat([flat(p, g) for p, g in zip(tensors, gradients, strict=True)]))
    return torch.stack(rows).reshape(*out.shape, -1).detach()


def flat(parameter, gradient):
    if gradient is None:
        return torch.zeros_like(parameter).reshape(-1)
    return (gradient.to_dense() if gradient.is_sparse else gradient).reshape(-1)


def gram_of(jacobian1, outputs, jacobian2=None):
    """Every form from Jacobians (n, C, p), by the definition."""
    jacobian2 = jacobian1 if jacobian2 is None else jacobian2
    if outputs == "sum":
        return jacobian1.sum(1) @ jacobian2.sum(1).T
    full = torch.einsum("icp,jdp->ijcd", jacobian1, jacobian2)
    if outputs is None:
        return full[:, :, 0, 0]
    if isinstance(outputs, int):
        return full[:, :, outputs, outputs]
    per_class = torch.einsum("ijcc->cij", full)
    return {"full": full, "per_class": per_class, "trace": per_class.sum(0), "mean": per_class.mean(0)}[outputs]


def distance(got, wanted):
    """Relative, in the Frobenius norm."""
    scale = wanted.double().norm()
    return float((got.double() - wanted.double()).norm() / (scale if scale > 0 else 1))


def assert_exact(got, wanted, tolerance=1e-12):
    assert got.shape == wanted.shape, f"shape {tuple(got.shape)}, wanted {tuple(wanted.shape)}"
    error = distance(got, wanted)
    assert error <= tolerance, f"relative error {error:.3g}"
