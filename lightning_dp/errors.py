"""The one exception type for settings that cannot be honoured."""


class ConfigError(ValueError):
    """A setting is wrong. The message is one line: what is wrong, which setting, what to do."""
