"""Several processes that do one thing together, for the tests of ranks."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def in_ranks(world: int, function: Callable[..., Any], *arguments: Any, directory: Path) -> list[Any]:
    """What a function returns in each of some new processes, which have one process group of gloo.

    Args:
        world: number of processes.
        function: importable by name.
        arguments: those of the function.
        directory: where they leave what they return.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    files = [directory / f"{function.__name__}-{rank}-of-{world}.pt" for rank in range(world)]
    processes = [
        context.Process(target=_rank, args=(rank, world, port, function, arguments, file))
        for rank, file in enumerate(files)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * world
    return [torch.load(file, weights_only=False) for file in files]


def _rank(
    rank: int, world: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...], file: Path
) -> None:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {**address, "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    torch.save(function(*arguments), file)
    torch.distributed.destroy_process_group()
