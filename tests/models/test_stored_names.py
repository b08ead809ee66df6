"""Checkpoints of RIAE name its layers as the first ones did, whatever the modules are called."""

import copy

import torch

from r2id.config import LossConfig, RiaeConfig
from r2id.models.riae import RIAE
from r2id.training.losses.riae import riae_loss

CONFIG = RiaeConfig(
    kind="attention",
    latent_channels=3,
    width=32,
    pixel_width=16,
    heads=2,
    encoder_blocks=1,
    decoder_blocks=1,
    fourier=(-1, 2),
)
# Names and shapes in model.safetensors of version 0.1, in the order of the weights.
STORED = """
pixel_in.0.weight 16x41
pixel_in.0.bias 16
pixel_in.2.weight 16x16
pixel_in.2.bias 16
cell_in.weight 32x32
cell_in.bias 32
encoder.0.norm.weight 32
encoder.0.context_norm.weight 16
encoder.0.attention.log_reach 2
encoder.0.attention.query.weight 20x32
encoder.0.attention.key.weight 20x16
encoder.0.attention.value.weight 32x16
encoder.0.attention.out.weight 32x32
encoder.0.attention.query_norm.weight 10
encoder.0.attention.key_norm.weight 10
encoder.0.ffn_norm.weight 32
encoder.0.ffn.gate.weight 96x32
encoder.0.ffn.value.weight 96x32
encoder.0.ffn.out.weight 32x96
to_latent.0.weight 32
to_latent.1.weight 3x32
to_latent.1.bias 3
latent_in.weight 32x35
latent_in.bias 32
point_in.0.weight 16x40
point_in.0.bias 16
point_in.2.weight 16x16
point_in.2.bias 16
decoder.0.norm.weight 16
decoder.0.context_norm.weight 32
decoder.0.attention.log_reach 1
decoder.0.attention.query.weight 10x16
decoder.0.attention.key.weight 10x32
decoder.0.attention.value.weight 16x32
decoder.0.attention.out.weight 16x16
decoder.0.attention.query_norm.weight 10
decoder.0.attention.key_norm.weight 10
decoder.0.ffn_norm.weight 16
decoder.0.ffn.gate.weight 32x16
decoder.0.ffn.value.weight 32x16
decoder.0.ffn.out.weight 16x32
to_colour.0.weight 16
to_colour.1.weight 1x16
to_colour.1.bias 1
"""


def stored():
    return [
        (name, tuple(map(int, shape.split("x"))))
        for name, shape in map(str.split, STORED.strip().splitlines())
    ]


def test_names_shapes_and_order_are_those_of_version_0_1():
    """The order too: gradient norms sum in it, and a new model's random weights follow it."""
    model = RIAE(CONFIG, 1)
    assert [(name, tuple(p.shape)) for name, p in model.named_parameters()] == stored()
    assert [(name, tuple(p.shape)) for name, p in model.state_dict().items()] == stored()


def test_a_stored_model_computes_with_what_is_loaded():
    """Weights reach the parts that compute, not only the names under which they are registered."""
    torch.manual_seed(0)
    model, image = RIAE(CONFIG, 1), torch.rand(1, 1, 12, 8)
    weights = {name: 0.3 * torch.randn(shape) for name, shape in stored()}
    before = model.decode(model.encode(image), (12, 8))
    model.load_state_dict(weights)
    after = model.decode(model.encode(image), (12, 8))
    assert not torch.allclose(before, after, atol=1e-3)
    torch.testing.assert_close(copy.deepcopy(model).decode(model.encode(image), (12, 8)), after)
    loss, _ = riae_loss(model, LossConfig(), seed=0)(image, torch.arange(1), step=0)
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
