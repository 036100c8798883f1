"""The accelerate configurations that are shipped say what accelerate understands."""

from __future__ import annotations

from importlib.resources import files

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig

KINDS = {
    "cpu": "NO",
    "single_gpu": "NO",
    "ddp": "MULTI_GPU",
    "fsdp2": "FSDP",
    "zero1": "DEEPSPEED",
    "zero2": "DEEPSPEED",
    "zero3": "DEEPSPEED",
}


@pytest.mark.parametrize("name", KINDS)
def test_it_loads(name: str) -> None:
    path = files("polyalign.configs.accelerate") / f"{name}.yaml"
    config = ClusterConfig.from_yaml_file(str(path))
    assert config.distributed_type.value == KINDS[name]
    assert config.use_cpu == (name == "cpu")
    written = yaml.safe_load(path.read_text())
    if name.startswith("zero"):
        assert written["deepspeed_config"]["zero_stage"] == int(name[-1])
    if name == "fsdp2":
        assert written["fsdp_config"]["fsdp_version"] == 2
