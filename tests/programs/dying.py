"""CONFIG: train; the first start is killed at step 6."""

import os

import train
from lumen import launch

real = train.Trainer.finish_pending_step


def finish(self):
    if self.step == 6 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), 9)
    return real(self)


train.Trainer.finish_pending_step = finish
launch.command(train.main, lasting=True)
