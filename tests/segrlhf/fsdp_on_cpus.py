"""``segrlhf`` under accelerate's FSDP2 on CPUs: accelerate shards for accelerators only, and takes
gloo's processes for one here."""

import os
import sys

from accelerate import state
from accelerate.utils import DistributedType

from segrlhf import cli

_init = state.AcceleratorState.__init__


def _init_sharded(self, *args, fsdp_plugin=None, **kwargs):
    _init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.fsdp_plugin = fsdp_plugin
        self.distributed_type = DistributedType.FSDP
        state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP


if __name__ == "__main__":
    state.AcceleratorState.__init__ = _init_sharded
    status = cli.main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(status)  # gloo's threads of FSDP are not joined at an orderly end, which aborts
