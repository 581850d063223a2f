"""`python -m vlprune.sweep`: runs what is not done of a table, and prints the table."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from typing import NoReturn

import tyro

from vlprune.config import ConfigError
from vlprune.sweep.aside import PlannerAside
from vlprune.sweep.command import sweep, verified
from vlprune.sweep.engine import Pool
from vlprune.sweep.launched import launched_pool
from vlprune.sweep.local import local_pool
from vlprune.sweep.options import Options
from vlprune.sweep.screen import console
from vlprune.sweep.worker import assist, work

INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which stops a sweep as Ctrl-C does."""


def _terminate(*_: object) -> NoReturn:
    raise _Terminated


def _interrupt(*_: object) -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the workers store where they are; once is enough
    raise KeyboardInterrupt


def _engine(options: Options) -> Callable[..., Pool]:
    """What makes the workers; ConfigError where Ray is not installed, or options do not go together."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if options.engine == "ray" and world > 1:
        raise ConfigError("--engine ray starts its own processes: start it without a launcher")
    if world > 1:
        return partial(launched_pool, size=world, assist=assist)
    if options.engine == "local":
        if options.address is not None:
            raise ConfigError("--address is that of a Ray cluster: give --engine ray, too")
        return local_pool
    from vlprune.sweep.cluster import cluster_pool  # an extra

    return cluster_pool


def main() -> None:
    """Runs the command line; of the processes of a launcher, the first does."""
    if int(os.environ.get("RANK", 0)) > 0:
        return
    logging.basicConfig(level=logging.WARNING, format="warning: %(message)s")
    options = tyro.cli(Options, prog="python -m vlprune.sweep")
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGTERM, _terminate)
    if before[signal.SIGINT] is not signal.SIG_IGN:  # as that of a job in the background is
        signal.signal(signal.SIGINT, _interrupt)
    try:
        if options.verify:
            code = verified(options.execution, console())
        else:
            with PlannerAside() as planner:
                code = sweep(options, planner, partial(_engine(options), work), console())
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        print("stopped; finished runs are kept, the same command goes on from here", file=sys.stderr)
        sys.exit(TERMINATED if isinstance(stop, _Terminated) else INTERRUPTED)
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is not signal.SIG_IGN:  # once interrupted, it stays so until the end
                signal.signal(number, handler)
    sys.exit(code)


if __name__ == "__main__":
    main()
