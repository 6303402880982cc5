"""Two optimizer steps on each of several gloo processes, natively sharded; prints one JSON line of rank 0.

    torchrun --nproc_per_node 2 tests/distributed/steps.py fsdp2 FOLDER       or zero2, zero3, or plain in one process

Trainer turns FSDP and DeepSpeed into DDP on a CPU, so this goes to accelerate's FSDP2 and to DeepSpeed themselves. Each process
takes its part of one batch of text and pictures; the losses are those of the whole batch.
"""

import json
import sys

import torch
import torch.distributed as dist

from minimonkey.modeling_minimonkey import MiniMonkeyForConditionalGeneration
from minimonkey.scripts.training.models import freeze
from minimonkey.scripts.training.trainer import sharded_layers


ROWS, TOKENS, RATE, STEPS = 4, 80, 1e-2, 3


def batch(config, rank: int, world_size: int) -> dict:
    """This process's rows of the batch: text, and a picture in each."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(10, 200, (ROWS, TOKENS), generator=generator)
    ids[:, 5 : 5 + config.image_seq_length] = config.image_token_id
    tiles = torch.randint(0, 256, (ROWS, 3, config.tile_size, config.tile_size), generator=generator).to(torch.uint8)
    rows = slice(rank * ROWS // world_size, (rank + 1) * ROWS // world_size)
    labels = ids.masked_fill(ids == config.image_token_id, -100)
    return {"input_ids": ids[rows], "labels": labels[rows], "pixel_values": tiles[rows]}


def shard_fsdp2(model):
    """As accelerate prepares a model for FSDP2."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    accelerator = Accelerator(cpu=True)
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        cpu_ram_efficient_loading=False,
        transformer_cls_names_to_wrap=sharded_layers(model),
    )
    return fsdp2_prepare_model(accelerator, model)


def main() -> None:
    kind, folder = sys.argv[1:]
    world_size = 1 if kind == "plain" else 2
    if kind != "plain":
        dist.init_process_group("gloo")
    rank = 0 if kind == "plain" else dist.get_rank()
    model = MiniMonkeyForConditionalGeneration.from_pretrained(folder)
    model = model.float().train()
    freeze(model, ["language_model", "projector"])
    inputs = batch(model.config, rank, world_size)
    details = {}
    if kind.startswith("zero"):
        import deepspeed

        deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": int(kind[-1])},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,
        }
        optimizer = torch.optim.SGD(trained, lr=RATE)
        model, optimizer, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        details["stage"] = model.zero_optimization_stage()
    else:
        model = shard_fsdp2(model) if kind == "fsdp2" else model
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    if kind == "fsdp2":
        from torch.distributed.fsdp import FSDPModule
        from torch.distributed.tensor import DTensor

        units = [type(module).__name__ for module in model.modules() if isinstance(module, FSDPModule)]
        parameters = list(model.parameters())
        whole = sum(parameter.numel() for parameter in parameters)
        here = sum(parameter.to_local().numel() for parameter in parameters if isinstance(parameter, DTensor))
        details |= {"units": sorted(set(units)), "share": here / whole}
    losses = []
    for _ in range(STEPS):
        loss = model(**inputs).loss
        if kind.startswith("zero"):
            model.backward(loss)
            model.step()
        else:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        loss = loss.detach()
        if kind != "plain":
            dist.all_reduce(loss)
        losses.append(loss.item() / world_size)
    if rank == 0:
        size = 1 if kind == "plain" else dist.get_world_size()
        report = {"wrapper": type(model).__name__, "world_size": size, "losses": losses, **details}
        sys.stdout.write(json.dumps(report) + "\n")
    if kind != "plain":
        dist.barrier()  # a process that ends while another still talks to it can abort
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
