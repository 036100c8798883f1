"""Token likelihoods of a network cut up by fully_shard against those of a whole one, as a script of two processes:
``python -m torch.distributed.run --nproc_per_node 2 token_sharded.py``."""

# ruff: isort: off
from __future__ import annotations

import polyalign  # noqa: F401  (first, as in conftest.py: arms the repair of CPU wheels)

# ruff: isort: on
import sys
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from polyalign.core.likelihood.tokens import TokenSettings, score_tokens

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "core"))

from token_models import batch, model_of  # noqa: E402  # pyright: ignore[reportMissingImports]

SHARINGS: tuple[Literal["on", "off"], ...] = ("on", "off")


def compare(*, tied: bool, layers: bool, reshard: bool | None) -> None:
    """Values to the bit; gradients, summed over processes, to rounding."""
    rank, processes = dist.get_rank(), dist.get_world_size()
    whole, cut = (model_of("Llama", tie_word_embeddings=tied) for _ in range(2))
    mesh = init_device_mesh("cpu", (processes,))
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": reshard}
    for layer in cut.model.layers if layers else ():
        fully_shard(layer, **options)
    fully_shard(cut, **options)
    tensors = batch(groups=4)
    own = {name: tensor[rank::processes] for name, tensor in tensors.items()}
    for sharing in SHARINGS:
        settings = TokenSettings(prefix_sharing=sharing)
        whole.zero_grad()
        cut.zero_grad()
        with torch.no_grad():
            before = score_tokens(cut, own, settings).values  # a reference's pass, which leaves the root as it likes
        found, expected = score_tokens(cut, own, settings).values, score_tokens(whole, tensors, settings).values
        (found.sum() * processes).backward()
        expected.sum().backward()
        assert torch.equal(found, before)
        torch.testing.assert_close(found, expected[rank::processes], rtol=0, atol=1e-12)
        for (name, parameter), other in zip(cut.named_parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad.full_tensor(), other.grad, rtol=0, atol=1e-12, msg=name)


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    assert dist.get_world_size() == 2
    compare(tied=False, layers=False, reshard=None)
    compare(tied=True, layers=True, reshard=None)
    compare(tied=False, layers=True, reshard=True)
    dist.destroy_process_group()
    print("the same")


if __name__ == "__main__":
    main()
