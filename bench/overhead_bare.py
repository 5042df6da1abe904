"""The training loop of a job without growth, as one would write it in plain PyTorch. The baseline of ``overhead.py``.

Run by ``overhead.py`` in a process of its own; prints one JSON object. Nothing of esperd is used but the function that builds
the host, so that both train the same network.
"""

from __future__ import annotations

import json
import math
import sys
import time

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from esperd.builtins.networks.cnn import cnn

GATE_BATCH = 512


def load(path: str | None) -> tuple[torch.Tensor, ...]:
    """The train and the gate split: images float32 in 0 to 1, channels first, and labels int64."""
    if path is not None:
        with np.load(path) as file:
            x_train, x_gate = (
                torch.from_numpy(file[f"x_{split}"]).permute(0, 3, 1, 2).contiguous() for split in ("train", "gate")
            )
            y_train, y_gate = (torch.from_numpy(file[f"y_{split}"]).long() for split in ("train", "gate"))
        return x_train.float() / 255.0, y_train, x_gate.float() / 255.0, y_gate
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(images.reshape(-1, 1, 8, 8).astype(np.float32) / np.float32(16.0)), torch.from_numpy(labels).long()
    # One set is divided as a job's [split] says: a fifth for the audit, a fifth for the gate, the rest to train.
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    part = round(len(x) * 0.2)
    gate, train = order[part : 2 * part], order[2 * part :]
    return x[train], y[train], x[gate], y[gate]


def main(settings: dict) -> dict:
    """Train, and say how long it took."""
    torch.set_num_threads(1)
    x_train, y_train, x_gate, y_gate = load(settings["data"])
    torch.manual_seed(settings["rng_seed"])
    network = cnn(**settings["host_options"])
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings["learning_rate"], weight_decay=settings["weight_decay"])
    steps = settings["epochs"] * math.ceil(len(x_train) / settings["batch_size"])
    step = 0
    epochs = []

    began = time.perf_counter()
    for epoch in range(settings["epochs"]):
        epoch_began = time.perf_counter()
        network.train()
        generator = torch.Generator().manual_seed((settings["rng_seed"] * 1_000_003 + epoch) % 2**32)
        order = torch.randperm(len(x_train), generator=generator)
        train_loss = torch.zeros(())
        for indices in torch.split(order, settings["batch_size"]):
            for group in optimizer.param_groups:
                group["lr"] = settings["learning_rate"] * (0.5 * (1.0 + math.cos(math.pi * step / steps)))
            x, y = x_train[indices], y_train[indices]
            optimizer.zero_grad(set_to_none=True)
            loss = cross_entropy(network(x), y, reduction="none").mean()
            loss.backward()
            optimizer.step()
            train_loss += loss.detach() * len(x)
            step += 1
        # A job looks at its gate split after every epoch; so does this loop, or they would not be the same.
        network.eval()
        gate_loss, correct = torch.zeros(()), torch.zeros(())
        with torch.no_grad():
            for x, y in zip(torch.split(x_gate, GATE_BATCH), torch.split(y_gate, GATE_BATCH), strict=True):
                output = network(x)
                gate_loss += cross_entropy(output, y, reduction="none").sum()
                correct += (output.argmax(dim=1) == y).sum()
        epochs.append(time.perf_counter() - epoch_began)
        print(
            f"epoch {epoch + 1}: train loss {float(train_loss) / len(x_train):.4f}, "
            f"gate loss {float(gate_loss) / len(x_gate):.4f}, gate accuracy {float(correct) / len(x_gate):.4f}",
            file=sys.stderr,
        )
    seconds = time.perf_counter() - began
    torch.save(network.state_dict(), settings["weights"])
    return {"seconds": seconds, "epochs": epochs, "parameters": sum(parameter.numel() for parameter in network.parameters())}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
