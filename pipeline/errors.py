"""The two ways a command ends badly; stages turn them into exit codes 2 and 1."""


class RequestError(ValueError):
    """The request was wrong (option, parameter or input); nothing was changed. Exit code 2."""


class RunFailed(RuntimeError):
    """The request was fine and the run still failed; work done so far is kept. Exit code 1."""


class EngineFailed(RunFailed):
    """The engine died, hung or refused; its process is gone and another one may be started."""
