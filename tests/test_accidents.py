"""Accidents of real life: what people and machines do to a run, one test each. Nothing may be lost, nobody misled.

Each test is an accident that happened to somebody (a report about another trainer, a try of our own), told in its
docstring: what was done, and what must be there afterwards.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, fingerprint, losses, read_lines, run_python, write_yaml

import checkpoint
from errors import UserError
from train import Trainer

# ---------------------------------------------------------------- a run has one owner; restarts; consoles, disks


# ---------------------------------------------------------------- what belongs to the data; moved and resumed runs


# ---------------------------------------------------------------- text, shards, sums


# ---------------------------------------------------------------- words on the command line and in the YAML


# ---------------------------------------------------------------- what does not fit


# ---------------------------------------------------------------- numbers


# ---------------------------------------------------------------- health and messages

