"""`python -m vlprune.sweep` on a Ray cluster each machine of which has a results directory of its own."""

import os
from dataclasses import replace
from pathlib import Path

from vlprune.sweep import __main__ as command

MACHINE = "VLPRUNE_TEST_MACHINE"  # the variable that holds it, which `ray start` is given


def do_apart(job, work, execution, flag, directory):
    from vlprune.sweep.cluster import _do

    return _do(job, work, replace(execution, store=Path(os.environ[MACHINE])), flag, directory)


if __name__ == "__main__":
    from vlprune.sweep import cluster

    cluster._do = do_apart
    command.main()
