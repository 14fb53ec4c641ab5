"""Where a training shows its figures while it runs: one file a logger; `base` holds the contract."""

from trainer.loggers.base import Begun, Logger, LoggerType, Progress, get_logger, logger, logger_names

__all__ = ["Begun", "Logger", "LoggerType", "Progress", "get_logger", "logger", "logger_names"]
