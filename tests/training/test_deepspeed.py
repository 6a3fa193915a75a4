"""DeepSpeed's ZeRO-Offload trains a compressed model as it is (docs/strategy.md)."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.paths import ROOT

PROGRAM = """
import deepspeed, torch, tensorize
from torch import distributed, nn

def model():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(48, 96), nn.ReLU(), nn.Linear(96, 48))
    return tensorize.initialize(dense, 0.5, example_inputs=(torch.zeros(1, 48),), progress=False)

def adamw(trained):
    return torch.optim.AdamW(trained.parameters(), lr=1e-2, weight_decay=0.0)

distributed.init_process_group("gloo")
batches = [torch.randn(4, 48) for _ in range(3)]
alone = model()
optimizer, wanted = adamw(alone), []
for x in batches:
    loss = alone(x).square().mean()
    wanted.append(loss.item())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
small = model()
config = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_clipping": 0,
    "zero_force_ds_cpu_optimizer": False,
    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": False}},
}
engine, *_ = deepspeed.initialize(model=small, optimizer=adamw(small), config=config)
for x, want in zip(batches, wanted, strict=True):
    loss = engine(x).square().mean()
    engine.backward(loss)
    engine.step()
    assert loss.item() == want, (loss.item(), want)
"""


@pytest.mark.slow
def test_zero_offload_steps_as_torch_does() -> None:
    pytest.importorskip("deepspeed")
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **alone, **meet},
        check=False,
    )
    assert done.returncode == 0, done.stderr
