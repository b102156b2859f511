"""One script run, from argv to exit code.

Exit codes: 0 done, 2 a user's mistake (one message, no traceback), 128 + n stopped by signal n after saving, 1
anything else, with the one-line cause last. Of several processes the one that failed first says why, and the others
end with its code (launch/ranks.py).
"""

import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf, flag_override

from launch import ranks, stop_signals
from launch.command_line import explain, prepare
from launch.composing import is_of_composing
from launch.errors import is_known_fault, is_users_mistake, one_line
from launch.run_dir import discard_if_unused, register_resolvers

_REFUSED = 2


def run(task: Callable[[], Any], script: str) -> NoReturn:
    """Run a `@hydra.main` task with the typed arguments and end the process with its exit code."""
    code = exit_code(task, script, sys.argv[1:])
    if stop_signals.told:
        ranks.end_now(code)  # a library that is half imported is not taken down in good order
    if code > 128 or ranks.started_by_lightning():
        stop_signals.ignore()
    ranks.end_workers()
    ranks.leave(code)


def exit_code(task: Callable[[], Any], script: str, argv: list[str]) -> int:
    """What a shell would see of `python <script>.py <argv>`; runs in this process."""
    register_resolvers()
    try:
        with _environment():
            sys.argv[1:] = argv = prepare(argv, script)
            task()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BrokenPipeError:  # the reader of our output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if is_of_composing(error):
            return _told() or _refuse(explain(error, argv, script))
        return _answer(error)
    return 0


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """What Hydra is told for one run, and taken back after it; the run's stamp ends with it too."""
    before = dict(os.environ)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach us as they are, instead of Hydra's own report
    os.environ["HYDRA_MAIN_MODULE"] = "__main__"  # config/ lies beside the script, also when that was imported
    try:
        yield
    finally:
        for name in ("HYDRA_FULL_ERROR", "HYDRA_MAIN_MODULE", "RUN_STAMP"):
            os.environ.pop(name, None)
            if name in before:
                os.environ[name] = before[name]


def _told() -> int:
    """The exit code of a process that was told to end, 0 for none: then no error is one, whatever became of it."""
    return 128 + stop_signals.told if stop_signals.told else 0


def _answer(error: Exception) -> int:
    if code := _told():
        return code
    if is_users_mistake(error):
        ranks.kill()
        return _refuse(one_line(error))
    if ranks.is_consequence(error) and (code := ranks.cause_elsewhere()) is not None:
        _to_log_file(traceback.format_exc())
        return code
    ranks.kill()  # they would only complain about this one
    return _fail(error)


def _refuse(message: str) -> int:
    print("\n".join(f"error: {line}" for line in message.splitlines()), file=sys.stderr)
    return _REFUSED


def _fail(error: Exception) -> int:
    _to_log_file(traceback.format_exc())
    known = is_known_fault(error)
    if not known:
        traceback.print_exc()
    print(f"failed: {'' if known else f'{type(error).__name__}: '}{one_line(error)}", file=sys.stderr)
    return 1


def _to_log_file(text: str) -> None:
    record = logging.makeLogRecord({"name": "launch", "levelno": logging.ERROR, "levelname": "ERROR", "msg": text})
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            handler.emit(record)


@contextlib.contextmanager
def one_job() -> Iterator[None]:
    """Make this job look as if it had been started alone.

    Lightning starts ranks above 0 by repeating `sys.argv`. In a sweep that would repeat the whole sweep, and with
    values that each process draws for itself the ranks of one group would train with different ones. So for the time
    of a job argv holds the job's own overrides, and what the job leaves in the environment is taken back.
    """
    hydra, code = HydraConfig.get(), 0
    try:
        if hydra.mode == RunMode.MULTIRUN:
            with _job_of_a_sweep(hydra):
                yield
        else:
            yield
    except Exception as error:
        code = _answer(error)
        raise SystemExit(code) from error  # here, since Hydra would print its own report on top
    else:
        ranks.finish()
    finally:
        ranks.kill()
        # A dry run, or a mistake found before the first step.
        discard_if_unused(Path(hydra.runtime.output_dir), refused=code == _REFUSED)


@contextlib.contextmanager
def _job_of_a_sweep(hydra: Any) -> Iterator[None]:
    argv, environment = sys.argv[:], dict(os.environ)
    typed = get_args_parser().parse_intermixed_args(argv[1:])
    flags = [
        f"--{flag}={value}"
        for flag, value in (
            ("config-name", typed.config_name),
            ("config-path", typed.config_path),
            ("config-dir", typed.config_dir),
        )
        if value
    ]
    of_the_sweep = ("hydra.mode=", "hydra.sweep", "hydra/sweeper", "hydra/launcher", "hydra.launcher")
    own = [o for o in OmegaConf.to_container(hydra.overrides.hydra) if not str(o).startswith(of_the_sweep)]  # type: ignore[union-attr]
    sys.argv = [argv[0], *flags, *hydra.overrides.task, *map(str, own)]
    with flag_override(hydra, ["readonly", "struct"], False):
        hydra.run.dir = hydra.runtime.output_dir  # Lightning hands this to the children
    try:
        yield
    finally:
        import torch.distributed

        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        sys.argv = argv
        os.environ.clear()
        os.environ.update(environment)
