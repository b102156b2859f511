"""What counts as a user's mistake: one clear line and exit code 2, never a traceback."""


class ConfigError(ValueError):
    """The command line or the configuration cannot be used; the message names the key and what to do."""


# By name, so that a command line that is wrong from the start need not import torch to say so.
_USERS_MISTAKES = {
    "ConfigError",
    "DataError",
    "CheckpointError",
    "MisconfigurationException",
    "InterpolationResolutionError",  # a value that another key points to was taken away, model.align=null
}


def is_users_mistake(error: BaseException) -> bool:
    return any(kind.__name__ in _USERS_MISTAKES for kind in type(error).__mro__)


def one_line(error: BaseException) -> str:
    """The message alone; of an error that crossed a loader's process, the last line of its traceback."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if key := getattr(error, "full_key", None):  # OmegaConf's: the cause, and lines about its own objects
        return f"{key}: {lines[0].rpartition(' raised while resolving interpolation: ')[2]}"
    if "DataLoader worker" not in lines[0]:
        return "\n".join(lines) if is_users_mistake(error) else lines[0]
    return lines[-1].partition(": ")[2] or lines[-1]
