"""Images per second of the original project's training step; against_original.py runs this.

    python tests/bench/original_step.py DIR configs/mnist/published-riae.toml [--steps 2]

DIR is a checkout of the original project. Widths, heads, blocks, batch and frequencies are those of
our config. A step is what the project's own training scripts do with a batch: forward, loss,
backward, AdamW and the moving average, in float32. The scripts themselves load data and train at
import, so that their loop is written anew here. What our step leaves out is left out here too: data
loading, the learning rate's schedule and, for the diffusion model, the autoencoder that makes the
latents.
"""

import argparse
import copy
import importlib
import inspect
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import baseline, rate, resident

from r2id.config import RiaeRun, load_config
from r2id.errors import InputError

IMAGE, CHANNELS = 32, 1  # the original's MNIST
LAYOUTS = (
    "RIAE and RIID in modules/r2id.py (commits fb27a89 to b97e9b7, attention per query), R2IR and "
    "RIID or R2ID there (4b10a7b to da0b5c9) or in modules/r2ir_r2id.py (7efed8f to b5f134e)"
)


def find(folder):
    """Find the autoencoder's and the diffusion model's classes, and what imports modules/NAME."""
    sys.path.insert(0, str(folder.resolve()))

    def module(name):
        try:
            return importlib.import_module(f"modules.{name}")
        except ModuleNotFoundError as error:
            if error.name and not error.name.startswith("modules"):
                raise InputError(
                    f"{folder}: needs the package {error.name!r}, which is not installed"
                ) from None
            return None

    for name in ("r2id", "r2ir_r2id"):
        models = module(name) if (folder / "modules" / f"{name}.py").is_file() else None
        autoencoder = getattr(models, "RIAE", None) or getattr(models, "R2IR", None)
        diffuser = getattr(models, "RIID", None) or getattr(models, "R2ID", None)
        if autoencoder and diffuser and "embed_dim" in inspect.signature(autoencoder).parameters:
            return autoencoder, diffuser, module
    raise InputError(
        f"{folder}: no checkout of the original project in a layout known here: {LAYOUTS}"
    )


def accepted(function, **settings):
    """Of these settings those that the function has: commits name and have different ones."""
    return {
        name: value
        for name, value in settings.items()
        if name in inspect.signature(function).parameters
    }


def autoencoder_loss(kind, config):
    """The autoencoder and a function of its loss."""
    riae, ratio = config.riae, int(config.riae.downsample)
    model = kind(
        **accepted(
            kind,
            col_channels=CHANNELS,
            lat_channels=riae.latent_channels,
            embed_dim=riae.width,
            num_heads=riae.heads,
            enc_blocks=riae.encoder_blocks,
            dec_blocks=riae.decoder_blocks,
            reduction=ratio,
            pos_high_freq=riae.fourier[1] + 1,
            pos_low_freq=-riae.fourier[0],
            dropout=0.1,
            mha_dropout=0.1,
            ffn_dropout=0.2,
        )
    )
    image = torch.rand(config.train.batch, CHANNELS, IMAGE, IMAGE) * 2 - 1

    def loss():
        latents = model.encode(
            image, **accepted(model.encode, fraction=config.loss.encode_cloud, scale=ratio)
        )
        return F.mse_loss(
            model.decode(
                latents, **accepted(model.decode, fraction=config.loss.decode_cloud, scale=ratio)
            ),
            image,
        )

    return model, [model], loss


def diffusion_loss(kind, module, config, grid, channels):
    """The diffusion model, what trains with it and its loss, under the class and under none."""
    r2id, batch = config.r2id, config.train.batch
    model = kind(
        **accepted(
            kind,
            c_channels=channels,
            d_channels=r2id.width,
            enc_blocks=r2id.encoder_blocks,
            dec_blocks=r2id.decoder_blocks,
            num_heads=r2id.heads,
            pos_high_freq=r2id.fourier[1] + 1,
            pos_low_freq=-r2id.fourier[0],
            time_high_freq=r2id.time_fourier[1] + 1,
            time_low_freq=-r2id.time_fourier[0],
            film_dim=128,
            cloud_dropout=0.1,
            self_attn_dropout=0.1,
            cross_dropout=0.1,
            cross_attn_dropout=0.1,
            ffn_dropout=0.2,
        )
    )
    text = module("dummy_textencoder").DummyTextCond(
        token_sequence_length=r2id.condition_tokens, d_channels=r2id.width
    )
    alpha_bar_of, corrupt = (
        module("alpha_bar").alpha_bar_cosine,
        module("corrupt_image").corrupt_image,
    )
    latent, label = (
        torch.randn(batch, channels, grid, grid),
        F.one_hot(torch.arange(batch) % 10, 10).float(),
    )

    def loss():
        with torch.no_grad():
            alpha_bar = alpha_bar_of(torch.rand(batch).sort().values)
            noisy, noise = corrupt(latent, alpha_bar)
            conditions = [text(label), text(torch.zeros_like(label))]
        return (
            sum(F.mse_loss(predicted, noise) for predicted in model(noisy, alpha_bar, conditions))
            / 2
        )

    return model, [model, text], loss


def measure(folder, config, steps):
    autoencoder, diffuser, module = find(folder)
    before = baseline()
    if isinstance(config, RiaeRun):
        model, trained, loss_of = autoencoder_loss(autoencoder, config)
    else:
        model, trained, loss_of = diffusion_loss(diffuser, module, config, grid=8, channels=64)
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW([p for part in trained for p in part.parameters()], lr=1e-4)
    model.train()

    def run(count, _first):
        for _ in range(count):
            loss = loss_of()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for mean, weight in zip(average.parameters(), model.parameters(), strict=True):
                    mean.mul_(config.train.ema).add_(weight, alpha=1 - config.train.ema)
            loss.item()

    found = rate(run, steps, 1, config.train.batch)
    return {
        **found,
        "memory": resident("VmHWM") - before,
        "parameters": sum(p.numel() for p in model.parameters()),
        "classes": f"{type(model).__name__} of {type(model).__module__}",
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("original", type=Path)
    parser.add_argument("config", type=Path)
    parser.add_argument("--steps", type=int, default=2)
    options = parser.parse_args()
    try:
        print(json.dumps(measure(options.original, load_config(options.config), options.steps)))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
