"""CONFIG: train; the first start is killed at step 6."""

import os

from lumen import launch
from train import Trainer


def main(argv):
    trainer = Trainer(argv)
    for step in trainer.iterations():
        if step == 6 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), 9)
    return trainer.end()


launch.command(main, lasting=True)
