"""How weights are trained and averaged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import swa_utils

from model_operations import Act, operation
from walks import TEXTS, NotNow, Subject

# Optimizers


def _train_step(s: Subject, optimizer: torch.optim.Optimizer) -> None:
    with torch.enable_grad():
        s.model.train()
        embeddings = s.model(s.model.preprocess(TEXTS))["sentence_embedding"]
        embeddings[:, 0].float().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def _optimize(make: Callable[..., torch.optim.Optimizer], **options: Any) -> Act:
    def act(s: Subject) -> None:
        parameters = [p for p in s.model.parameters() if p.requires_grad]
        if not parameters:
            raise NotNow
        _train_step(s, make(parameters, **options))

    return act


for _class, _rate in (("SGD", 0.3), ("Adam", 0.02), ("AdamW", 0.02), ("Adagrad", 0.02)):
    for _mode in ("plain", "foreach", "fused"):
        _options = {"foreach": _mode == "foreach", "fused": _mode == "fused"}
        operation(
            _optimize(getattr(torch.optim, _class), lr=_rate, **_options),
            name=f"{_class} {_mode}",
            weight=0.5,
        )
for _class in ("RMSprop", "NAdam", "RAdam", "Adafactor", "Adamax"):
    operation(_optimize(getattr(torch.optim, _class), lr=0.02), name=_class, weight=0.3)


@operation
def one_layer_trained_fused(s: Subject) -> None:
    _train_step(s, torch.optim.AdamW(s.layer().parameters(), lr=0.05, fused=True))


# Averages


def _averaged(make: Callable[[nn.Module], swa_utils.AveragedModel]) -> Act:
    def act(s: Subject) -> None:
        averaged = make(s.base)
        averaged.update_parameters(s.base)
        with torch.no_grad():
            s.weight().mul_(2)
        averaged.update_parameters(s.base)
        pairs = zip(s.base.parameters(), averaged.module.parameters(), strict=True)
        for parameter, mean in pairs:
            parameter.data.copy_(mean.data)

    return act


operation(_averaged(swa_utils.AveragedModel), name="stochastic weight averaging")
operation(
    _averaged(
        lambda base: swa_utils.AveragedModel(base, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5))
    ),
    name="exponential moving average",
)
