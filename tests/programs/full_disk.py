"""FULL FREE CONFIG: train; from step FULL to FREE the disk takes files of 60 kB only: no checkpoint, a line of log."""

import resource
import signal
import sys

import train

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
full, free_again = int(sys.argv[1]), int(sys.argv[2])
real = train.Trainer.save


def save(self, **how):
    limit = 60_000 if full <= self.step < free_again else resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    return real(self, **how)


train.Trainer.save = save
sys.exit(train.main(sys.argv[3:]))
