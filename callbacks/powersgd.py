"""PowerSGD, torch's own compression of what DDP exchanges.

Vogels et al., "PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization", 2019
(arXiv 1905.13727).
"""

import logging

import pytorch_lightning as pl
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

log = logging.getLogger(__name__)


def register(trainer: pl.Trainer, *, rank: int, start_step: int) -> PowerSGDState | None:
    """Give the trainer's DDP wrapper, which has to be a new one, a hook with a state of its own.

    Returns the state; None, and says so, where there is nothing to exchange. *start_step*: exchanges that are not
    compressed yet, at least 2.
    """
    if not isinstance(model := trainer.strategy.model, DistributedDataParallel):
        log.info("dbc: comm=powersgd has no effect with one process")
        return None
    state = PowerSGDState(process_group=None, matrix_approximation_rank=rank, start_powerSGD_iter=start_step)
    model.register_comm_hook(state, powerSGD_hook)
    return state


def forget(state: PowerSGDState) -> None:
    """Begin anew: what is remembered of a gradient that is not finite would make all later ones so."""
    for remembered in (state.error_dict, state.p_memory_dict, state.q_memory_dict):
        remembered.clear()
