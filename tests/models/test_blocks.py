"""What is computed by hand to keep less for the backward pass: the same as PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from r2id.models.attention import RMSNorm, linear_together
from r2id.models.layers import DiffusionBlock, Dropout, FeedForward, _Gated, store_in_bfloat16


@pytest.mark.parametrize("affine", [False, True])
def test_norm_has_the_derivative_of_what_it_computes(affine):
    norm = RMSNorm(6, elementwise_affine=affine).double()
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    if affine:
        torch.nn.init.normal_(norm.weight)
        assert torch.autograd.gradcheck(lambda x, _weight: norm(x), (x, norm.weight))
    else:
        assert torch.autograd.gradcheck(norm, (x,))


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_and_its_gradient_equal_pytorchs(dtype, affine):
    norm, x = (
        RMSNorm(32, elementwise_affine=affine),
        torch.randn(4, 7, 3, 32, dtype=dtype).transpose(1, 2),
    )
    if affine:
        torch.nn.init.normal_(norm.weight)
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    tolerance = (
        {"atol": 0.06, "rtol": 0.02} if dtype == torch.bfloat16 else {"atol": 1e-5, "rtol": 1e-5}
    )
    out, expected = (
        norm(ours),
        F.rms_norm(theirs, (32,), None if norm.weight is None else norm.weight.to(dtype)),
    )
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected, **tolerance)
    for result in (out, expected):
        (result.float() * torch.linspace(-1, 1, 32)).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, **tolerance)


def test_gated_layer_has_the_derivative_of_what_it_computes():
    gate, value = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.testing.assert_close(_Gated.apply(gate, value), F.silu(gate) * value)
    assert torch.autograd.gradcheck(_Gated.apply, (gate, value))


def test_dropout_drops_its_share_and_scales_the_rest():
    x, drop = torch.ones(64, 1001, requires_grad=True), Dropout(0.25)
    torch.manual_seed(3)
    out = drop(x)
    out.sum().backward()
    assert out.unique().tolist() == pytest.approx([0, 4 / 3])
    assert (out == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert torch.equal(x.grad, out)
    torch.manual_seed(3)
    assert torch.equal(drop(x), out), "drawn from torch's generator"
    assert drop.eval()(x) is x


def test_layers_together_compute_what_each_does():
    x, layers = torch.randn(2, 5, 8), [nn.Linear(8, out, bias=False) for out in (8, 8, 3)]
    with torch.no_grad():
        parts = linear_together(x, *layers)
    for part, layer in zip(parts, layers, strict=True):
        torch.testing.assert_close(part, layer(x))


def test_weights_stored_in_bfloat16_give_the_bits_of_autocast():
    torch.manual_seed(0)
    block = DiffusionBlock(64, 2, 4.0, dropout=0.0, conditional=True)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.1)
        x, time, context = torch.randn(2, 6, 64), torch.randn(2, 64), torch.randn(2, 3, 64)
        with torch.autocast("cpu", torch.bfloat16):
            expected = block(x, time, context)
            store_in_bfloat16(block)
            assert torch.equal(block(x, time, context), expected)


def test_blocks_keep_little_for_the_backward_pass():
    """Of a norm its input and a scale per row; of a gated layer what goes into its three products,
    and two more; of dropout a byte per element."""

    def kept(layer, x):
        storages = {}

        def note(tensor):
            storages[tensor.untyped_storage()._cdata] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            result = layer(x)
        weights = {p.untyped_storage()._cdata for p in layer.parameters()}
        total = sum(
            tensor.untyped_storage().nbytes()
            for key, tensor in storages.items()
            if key not in weights
        )
        del result
        return total

    x = torch.randn(2, 100, 96, requires_grad=True)
    rows, size = 200, x.nbytes
    assert kept(RMSNorm(96), x) == size + 4 * rows
    assert kept(RMSNorm(96, elementwise_affine=False), x) == size + 4 * rows
    assert kept(Dropout(0.5), x) == x.numel()
    layer = FeedForward(96, 4.0)
    assert kept(layer, x) == size + 3 * rows * 4 * layer.gate.out_features
