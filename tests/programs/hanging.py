"""SCRIPT RANK CONFIG: run SCRIPT's main; RANK falls asleep for ever when it reads its fourth
rows."""

import importlib
import os
import sys
import time

from lumen import launch, loader

script, rank, *words = sys.argv[1:]
following = loader.Loader.next
reads = []


def hang(self):
    reads.append(1)
    if len(reads) == 4 and os.environ["RANK"] == rank:
        print("ASLEEP", flush=True)
        while True:
            time.sleep(1)
    return following(self)


loader.Loader.next = hang
sys.argv[1:] = words
launch.command(importlib.import_module(script).main)
