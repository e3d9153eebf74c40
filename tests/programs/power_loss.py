"""POINT STEP CONFIG: train; the power goes at POINT of the save of STEP."""

import os
import pathlib
import shutil
import sys

import train
from lumen import checkpoint

point, step = sys.argv[1], int(sys.argv[2])
real_commit, real_rename = checkpoint.commit, pathlib.Path.rename
renamed = []


def die(*args, **options):
    os._exit(9)


def rename_once(self, target):
    if renamed:
        die()
    renamed.append(target)
    return real_rename(self, target)


def commit(folder, final, world, state):
    if state["step"] != step:
        return real_commit(folder, final, world, state)
    if point == "before commit":
        die()
    if point == "no manifest":
        checkpoint.write_json = die
    if point == "moved aside":
        shutil.copytree(checkpoint.step_dir(final.parent, step - 4), final)
        pathlib.Path.rename = rename_once
    if point == "pruning":
        shutil.rmtree = die
    return real_commit(folder, final, world, state)


checkpoint.commit = commit
sys.exit(train.main(sys.argv[3:]))
